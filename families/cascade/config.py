"""Configuration keys that the scripts of the cascade share."""

from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from families.cascade.versions import VERSIONS, Version
from warpcore.config import Config, FileName, Settings, Share
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import SAMPLERS


class FamilySettings(Settings):
    """Which size of the cascade."""

    model_version: Literal["3.6B", "1B", "mini"] = "3.6B"
    """Size of Stage C, and with it of the networks around it; `mini` is a toy cascade for 128 px pictures."""

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]


class ModelSettings(FamilySettings):
    """Where the weights of the networks are."""

    generator_checkpoint_path: Path | None = None
    """Weights of the network that is trained or drawn with (.safetensors); without it, random ones."""
    effnet_checkpoint_path: Path | None = None
    """Weights of the encoder; by default where `models/download.py` puts them."""
    previewer_checkpoint_path: Path | None = None
    """Weights of the previewer; by default where `models/download.py` puts them."""
    stage_a_checkpoint_path: Path | None = None
    """Weights of Stage A; by default where `models/download.py` puts them."""
    clip_text_model_name: FileName | None = None
    """Text tower: a public name (`laion/CLIP-ViT-bigG-14-laion2B-39B-b160k`), open_clip's `MODEL:TAG`, or a file."""
    clip_text_checkpoint_path: Path | None = None
    """Weights of the text tower as a local file, instead of a download by its name."""
    clip_image_model_name: FileName | None = None
    """Image tower, named like the text tower."""
    clip_image_checkpoint_path: Path | None = None
    """Weights of the image tower as a local file, instead of a download by its name."""

    diffusion_target: Literal["epsilon", "x0", "v", "rectified_flows"] | None = None
    """What the network predicts: noise, clean latents, v (learns faster from zero), or straight flow. By default what
    its weights file says, or noise where it says nothing (published weights)."""


class DiffusionConfig(ModelSettings, Config):
    """What the training scripts of Stage B and of Stage C understand."""

    change_target: bool = False
    """Allow another `diffusion_target` than the weights file to start from says; the network then learns it."""
    caption_dropout: Share = 0.05
    """Share of the captions replaced by an empty one, so that guidance has something to compare with."""
    cache_text: bool = False
    """Keep the text conditions of captions in the CPU's memory after their first use: for sets of few captions."""
    cache_text_gb: PositiveFloat = 4
    """What they may take there, in units of 10^9 bytes and per process."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "p2"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    adaptive_loss_weight: bool = False
    """The published name of `loss_weight: adaptive`: divide the loss by its own running mean at each noise level."""
    offset_noise: NonNegativeFloat = 0.0
    """Strength of noise that shifts whole channels; helps with very dark and very bright pictures."""
    shift: PositiveFloat = 1.0
    """Moves the training noise to more (> 1) or less; larger latents want more."""
    sample_steps: PositiveInt = 20
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 5.0
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """Sampler of those pictures."""
    sample_count: PositiveInt = 8
    """How many pictures are drawn at most."""

    @model_validator(mode="after")
    def _one_loss_weight(self) -> Self:
        if self.adaptive_loss_weight and self.loss_weight not in ("p2", "adaptive"):
            raise ValueError(f"adaptive_loss_weight contradicts loss_weight: {self.loss_weight}; remove one")
        return self


class StageCConfig(DiffusionConfig):
    """What every training script of Stage C understands."""

    unused = frozenset({"stage_a_checkpoint_path"})

    clip_image_dropout: Share = 0.9
    """Share of the samples without the image condition; at 1 the image tower is not even loaded."""
    sample_prompts: list[str] = []
    """Captions to draw at every save; without them those of held-out samples, or else of a few training samples, are
    taken."""
