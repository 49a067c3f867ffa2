"""Constructor numbers of the published networks of Open-Sora 1.2 and of the mini."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.common.t5 import T5_XXL, T5_XXL_NAME
from modules.stdit3 import SIZES

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""
AUTOENCODER_NAME = "hpcai-tech/OpenSora-VAE-v1.2"
"""Where the published autoencoder is by default, as a config names it."""
COMMON = {
    "input_sq_size": 512, "in_channels": 4, "patch_size": [1, 2, 2], "pred_sigma": True, "caption_channels": 4096,
    "model_max_length": 300, "qk_norm": True,
}  # fmt: skip
"""Of `modules.stdit3.STDiT3`, in all published sizes."""


@dataclass(frozen=True)
class Version:
    """One size of STDiT3."""

    network: Mapping[str, Any]
    """Constructor numbers of `modules.stdit3.STDiT3`."""
    autoencoder: str = AUTOENCODER_NAME
    """The autoencoder by default, as a config names it."""
    text: Mapping[str, Any] | None = None
    """Config of transformers' T5EncoderModel; None where its file says it."""
    text_encoder: str = T5_XXL_NAME
    """The text encoder by default, as a config names it."""

    @property
    def is_published(self) -> bool:
        """Whether the network has the autoencoder and the text encoder of the published weights."""
        return self.autoencoder == AUTOENCODER_NAME

    @property
    def text_length(self) -> int:
        """L: tokens of a text, of which the network's own empty text has as many rows."""
        return self.network["model_max_length"]


VERSIONS = {
    **{name: Version(COMMON | sizes, text=T5_XXL) for name, sizes in SIZES.items()},
    "mini": Version(
        {
            "input_sq_size": 64, "in_channels": 16, "patch_size": [1, 2, 2], "pred_sigma": False,
            "caption_channels": 64, "model_max_length": 32, "qk_norm": True, "hidden_size": 128, "num_heads": 4,
            "depth": 3,
        },
        autoencoder=str(MINI / "video_autoencoder.safetensors"),
        text_encoder=str(MINI / "t5.safetensors"),
    ),
}  # fmt: skip
"""By `model_version`."""


def version_of(config: Mapping[str, Any]) -> str | None:
    """Which version constructor numbers are of; None for another one."""
    keys = ("hidden_size", "num_heads", "depth", "in_channels")
    return next(
        (name for name, version in VERSIONS.items() if all(config.get(key) == version.network[key] for key in keys)),
        None,
    )
