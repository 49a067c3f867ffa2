"""Constructor numbers of the published networks of PixArt-alpha (arXiv:2310.00426) and of the mini."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from families.common.t5 import T5_XXL, T5_XXL_NAME
from families.dit.versions import MINI, Version


@dataclass(frozen=True)
class TextVersion(Version):
    """One size of PixArt-alpha; `network` has the constructor numbers of diffusers' PixArtTransformer2DModel."""

    text_length: int = 120
    """L: tokens of a text, of which the network's own empty text has as many rows."""
    text: Mapping[str, Any] | None = None
    """Config of transformers' T5EncoderModel; None where its file says it."""
    text_encoder: str = T5_XXL_NAME
    """The text encoder by default, as a config names it."""

    @property
    def sees_sizes(self) -> bool:
        """Whether the network is told the size and the aspect ratio of the picture."""
        return self.network["use_additional_conditions"]


def numbers(heads: int, head_size: int, blocks: int, caption_channels: int, **others: Any) -> dict[str, Any]:
    """Constructor numbers of diffusers' PixArtTransformer2DModel that learns variances."""
    return {
        "num_attention_heads": heads, "attention_head_dim": head_size, "num_layers": blocks,
        "cross_attention_dim": heads * head_size, "caption_channels": caption_channels, "in_channels": 4,
        "out_channels": 8, "patch_size": 2, "interpolation_scale": 1, "use_additional_conditions": False,
    } | others  # fmt: skip


def _published(side: int, **others: Any) -> TextVersion:
    return TextVersion(numbers(16, 72, 28, 4096, sample_size=side // 8, **others), image_size=side, text=T5_XXL)


VERSIONS = {
    "XL/2-256": _published(256),
    "XL/2-512": _published(512),
    "XL/2-1024-MS": _published(1024, interpolation_scale=2, use_additional_conditions=True),
    "mini": TextVersion(
        numbers(4, 32, 6, 64, in_channels=16, out_channels=32, patch_size=1, sample_size=8),
        autoencoder=str(MINI / "autoencoder.safetensors"),
        image_size=128,
        text_length=32,
        text_encoder=str(MINI / "t5.safetensors"),
    ),
}
"""By `model_version`."""


def version_of(config: Mapping[str, Any]) -> str | None:
    """Which version constructor numbers are of; None for another one."""
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "sample_size")
    return next(
        (name for name, version in VERSIONS.items() if all(config.get(k) == version.network[k] for k in keys)), None
    )
