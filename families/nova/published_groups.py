"""What published trainings of NOVA freeze, and which weights they let decay, as entries of `parameter_groups`."""

from collections.abc import Collection
from typing import Literal

from warpcore.parameter_groups import ParameterGroup

Kind = Literal["text to image", "text to video", "class to image"]
FROZEN: dict[Kind, tuple[str, ...]] = {
    "text to image": ("text_embed.norm.*", "video_pos_embed.*", "video_encoder.patch_embed.*", "motion_embed.*"),
    "text to video": ("text_embed.norm.*", "motion_embed.*"),
    "class to image": ("label_embed.norm.*", "video_pos_embed.*", "video_encoder.patch_embed.*"),
}
"""Parameters that are not trained."""
NORMS = tuple(f"*.{norm}.{kind}" for norm in ("norm", "norm1", "norm2") for kind in ("weight", "bias"))
"""Those of norms, which do not decay. What modulates tokens (`norm1.proj`) is none."""


def published_groups(kind: Kind, parameters: Collection[str], weight_decay: float = 0.02) -> list[ParameterGroup]:
    """The groups of a published training: unlike here without them, biases and tokens decay, too.

    parameters: names of the network's, as NETWORK.NAME. A group that none of them falls into is left out: networks of
        pictures are told no motion.
    """
    frozen = [ParameterGroup(pattern=pattern, frozen=True) for pattern in FROZEN[kind]]
    norms = [ParameterGroup(pattern=pattern, weight_decay=0.0) for pattern in NORMS]
    groups = [*frozen, *norms, ParameterGroup(pattern="*", weight_decay=weight_decay)]
    taken = {next(i for i, group in enumerate(groups) if group.matches(name)) for name in parameters}
    return [groups[i] for i in sorted(taken)]
