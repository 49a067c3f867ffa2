"""The config keys of techniques, which the config of a transformer's training script inherits."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from families.common.techniques.repa import RepaSettings
from families.common.techniques.tread import TreadSettings
from warpcore.config import Settings

TECHNIQUES = frozenset({"repa", "tread"})
"""The keys."""


def _switched(value: Any) -> Any:
    """`true` switches on what has defaults alone, `false` is none."""
    return ({} if value else None) if isinstance(value, bool) else value


class TechniqueSettings(Settings):
    """Techniques for training transformers from scratch."""

    repa: Annotated[RepaSettings | None, BeforeValidator(_switched)] = None
    """Align the tokens of an early block with the patches of a frozen image encoder (arXiv:2410.06940): `true`, or a
    mapping with some of the keys `encoder`, `block`, `weight` and `projector_width`."""
    tread: Annotated[TreadSettings | None, BeforeValidator(_switched)] = None
    """Let a share of the tokens skip the middle blocks in training, which takes less time (arXiv:2501.04765): `true`,
    or a mapping with some of the keys `share`, `start` and `end`."""
