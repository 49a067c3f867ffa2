"""Configuration keys that the scripts of the cascade share."""

from typing import Literal, Self

from pydantic import model_validator

from families.cascade.versions import VERSIONS, Version
from families.common.config import DiffusionConfig, VersionSettings
from families.common.prompt_flags import Prompt
from warpcore.config import FileName, Settings, Share
from warpcore.config_keys import Steps
from warpcore.idle_keys import Need
from warpcore.keys import Weights


class FamilySettings(Settings):
    """Which size of the cascade."""

    model_version: Literal["3.6B", "1B", "mini"] = "3.6B"
    """Size of Stage C, and with it of the networks around it; `mini` is a toy cascade for 128 px pictures."""

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]


class ModelSettings(FamilySettings, VersionSettings):
    """Where the weights of the networks are."""

    effnet_checkpoint_path: Weights | None = None
    """Weights of the encoder; by default where `models/download.py` puts them."""
    previewer_checkpoint_path: Weights | None = None
    """Weights of the previewer; by default where `models/download.py` puts them."""
    stage_a_checkpoint_path: Weights | None = None
    """Weights of Stage A; by default where `models/download.py` puts them."""
    clip_text_model_name: FileName | None = None
    """Text tower: a public name (`laion/CLIP-ViT-bigG-14-laion2B-39B-b160k`), open_clip's `MODEL:TAG`, or a file."""
    clip_text_checkpoint_path: Weights | None = None
    """Weights of the text tower, instead of those that its name has."""
    clip_image_model_name: FileName | None = None
    """Image tower, named like the text tower."""
    clip_image_checkpoint_path: Weights | None = None
    """Weights of the image tower, instead of those that its name has."""


class CascadeConfig(ModelSettings, DiffusionConfig):
    """What the training scripts of Stage B and of Stage C understand."""


class StageBConfig(CascadeConfig):
    """What `train/train_b.py` understands."""

    unused = frozenset({
        "previewer_checkpoint_path", "clip_image_model_name", "clip_image_checkpoint_path",
        "multires_noise_iterations", "multires_noise_discount",  # its own noise has many resolutions
    })  # fmt: skip

    model_version: Literal["3B", "700M", "mini"] = "3B"
    """Size of Stage B, and with it of the networks around it; `mini` is a toy cascade for 128 px pictures."""
    effnet_scale: tuple[Share, Share] = (0.5, 1.0)
    """The encoder sees the picture scaled down by a random factor between these; smaller ones teach Stage B to work
    from fewer latents, which is a higher compression."""
    effnet_dropout: Share = 0.1
    """Share of the samples without the encoder's latents."""
    train_encoder: bool = False
    """Train the encoder too, so that its latents say what Stage B needs."""
    sample_steps: Steps = 10
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 1.1
    """Classifier-free guidance of those pictures."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.effnet_scale
        if not 0 < low <= high:
            raise ValueError(f"effnet_scale: {low}, {high} is not a valid range: the smaller first, above 0")
        return self


class StageCConfig(CascadeConfig):
    """What every training script of Stage C understands."""

    unused = frozenset({"stage_a_checkpoint_path"})
    needs = dict.fromkeys(
        ("clip_image_model_name", "clip_image_checkpoint_path"),
        Need("clip_image_dropout below 1", lambda config: config.clip_image_dropout < 1),
    )

    clip_image_dropout: Share = 0.9
    """Share of the samples without the image condition; at 1 the image tower is not even loaded."""
    sample_prompts: list[Prompt] = []
    """Captions to draw at every save; without them those of held-out samples, or else of a few training samples, are
    taken."""
