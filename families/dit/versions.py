"""Constructor numbers of the published networks of DiT and of the mini."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""
PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""The autoencoder of published networks, on the hub; its latents are scaled by 0.18215."""


@dataclass(frozen=True)
class Version:
    """One size of DiT."""

    network: Mapping[str, Any]
    """Constructor numbers of `modules.dit.DiT`, without those that a config gives."""
    autoencoder: str = PUBLISHED_AUTOENCODER
    """The autoencoder by default, as a config names it."""
    image_size: int = 256
    """Side of the pictures that it draws where nothing else is said."""


def _published(width: int, blocks: int, heads: int) -> Version:
    return Version({"hidden_size": width, "depth": blocks, "num_heads": heads, "patch_size": 2, "in_channels": 4})


VERSIONS = {
    "XL/2": _published(1152, 28, 16),
    "L/2": _published(1024, 24, 16),
    "B/2": _published(768, 12, 12),
    "S/2": _published(384, 12, 6),
    "mini": Version(
        {"hidden_size": 128, "depth": 6, "num_heads": 4, "patch_size": 1, "in_channels": 16},
        autoencoder=str(MINI / "autoencoder.safetensors"),
        image_size=128,
    ),
}
"""By `model_version`: the sizes of arXiv:2212.09748, table 1, with patches of 2 x 2. XL/2 alone was published."""


def version_of(config: Mapping[str, Any]) -> str | None:
    """Which version constructor numbers are of; None for another one."""
    keys = ("hidden_size", "depth", "patch_size", "in_channels")
    return next(
        (name for name, version in VERSIONS.items() if all(config.get(k) == version.network[k] for k in keys)), None
    )
