"""The published networks of Open-Sora 1.0, 1.1 and 1.2, and their minis: numbers, and what goes with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.common.t5 import T5_XXL, T5_XXL_NAME
from modules.stdit import XL_2, STDiT, STDiT2
from modules.stdit3 import SIZES, STDiT3
from modules.stdit_parts import ClipTransformer

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""
AUTOENCODER_NAME = "hpcai-tech/OpenSora-VAE-v1.2"
"""Where the published autoencoder of 1.2 is by default, as a config names it."""
OF_FRAMES_NAME = "stabilityai/sd-vae-ft-ema"
"""The same of 1.0 and 1.1: of pictures, which sees frame by frame."""
FLOW, NOISE = "rectified_flows", "epsilon"
"""What networks predict: the way from noise to clip (1.2), or the noise and its variance (1.0 and 1.1)."""
COMMON = {
    "input_sq_size": 512, "in_channels": 4, "patch_size": [1, 2, 2], "pred_sigma": True, "caption_channels": 4096,
    "model_max_length": 300, "qk_norm": True,
}  # fmt: skip
"""Of `modules.stdit3.STDiT3`, in all published sizes."""
OLDER = XL_2 | {name: COMMON[name] for name in ("in_channels", "patch_size", "pred_sigma", "caption_channels")}
"""Of the networks of `modules.stdit`."""
MINI_NUMBERS = {
    "in_channels": 16, "patch_size": [1, 1, 1], "pred_sigma": True, "caption_channels": 64, "model_max_length": 32,
    "num_heads": 4, "depth": 4,
}  # fmt: skip
"""Of the minis of 1.0 and 1.1."""


@dataclass(frozen=True)
class Version:
    """One size of a network."""

    network: Mapping[str, Any]
    """Constructor numbers."""
    kind: type[ClipTransformer] = STDiT3
    autoencoder: str = AUTOENCODER_NAME
    """The autoencoder by default, as a config names it."""
    text: Mapping[str, Any] | None = None
    """Config of transformers' T5EncoderModel; None where its file says it."""
    text_encoder: str = T5_XXL_NAME
    """The text encoder by default, as a config names it."""
    cleans_captions: bool = False
    """Whether captions of the training are cleaned before T5 reads them."""
    clip: tuple[int, int, int] = (51, 240, 426)
    """(T, H, W) of clips to draw where nothing says it."""
    fps: float = 24.0
    """Frames per second of these."""

    @property
    def is_published(self) -> bool:
        """Whether the network has the autoencoder and the text encoder of the published weights."""
        return self.text is not None

    @property
    def target(self) -> str:
        """What the network predicts; see `FLOW`."""
        return FLOW if self.kind is STDiT3 else NOISE

    @property
    def drawn_by(self) -> Mapping[str, Any]:
        """Sampler and number of steps of the published program."""
        return {"sampler": "euler", "steps": 30} if self.target == FLOW else {"sampler": "iddpm", "steps": 100}

    @property
    def title(self) -> str:
        """What an error calls the network."""
        return self.kind.__name__

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
        clip=(17, 64, 64),
        fps=8.0,
    ),
    "STDiT2-XL/2": Version(
        OLDER | {"input_sq_size": 512, "model_max_length": 200, "qk_norm": True, "qk_norm_legacy": True},
        STDiT2,
        autoencoder=OF_FRAMES_NAME,
        text=T5_XXL,
        clip=(16, 240, 426),
    ),
    "STDiT-XL/2": Version(
        OLDER | {"input_size": [16, 32, 32], "model_max_length": 120},
        STDiT,
        autoencoder=OF_FRAMES_NAME,
        text=T5_XXL,
        cleans_captions=True,
        clip=(16, 256, 256),
        fps=8.0,
    ),
    "mini-1.1": Version(
        MINI_NUMBERS
        | {"input_sq_size": 64, "hidden_size": 144, "qk_norm": True, "qk_norm_legacy": True},
        STDiT2,
        autoencoder=str(MINI / "autoencoder.safetensors"),
        text_encoder=str(MINI / "t5.safetensors"),
        clip=(6, 64, 64),
        fps=2.0,
    ),
    "mini-1.0": Version(
        MINI_NUMBERS | {"input_size": [6, 4, 4], "hidden_size": 128},
        STDiT,
        autoencoder=str(MINI / "autoencoder.safetensors"),
        text_encoder=str(MINI / "t5.safetensors"),
        cleans_captions=True,
        clip=(6, 64, 64),
        fps=2.0,
    ),
}  # fmt: skip
"""By `model_version`."""
