"""Configuration keys of DiT, and those that the other networks on the same latents share with it."""

from typing import Literal, Self

from pydantic import model_validator

from families.common.class_keys import CAPTION_KEYS, ClassCount, ClassSettings, NamedClasses
from families.common.config import DiffusionConfig, VersionSettings
from families.common.techniques.config import TechniqueSettings
from families.dit.versions import VERSIONS, Version
from warpcore.config_keys import Steps
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.keys import Weights


class LatentSettings(VersionSettings):
    """The autoencoder whose latents are drawn."""

    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder: a folder of diffusers, a file that holds its config, or a name of the Hugging Face hub; by
    default stabilityai/sd-vae-ft-ema, and for `model_version: mini` the one that ships."""
    autoencoder_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says."""


class DitSettings(NamedClasses, LatentSettings):
    """Which DiT, and of which classes.

    `generator_checkpoint_path` takes a published file (`DiT-XL-2-256x256.pt`), a file that a run exported, or a run's
    folder.
    """

    model_version: Literal[tuple(VERSIONS)] = "XL/2"
    """Size of the network; `mini` is a toy for 128 px pictures."""
    learn_sigma: bool = True
    """Predict the variance of each step too, as published networks do: the output has twice the channels."""
    num_classes: ClassCount = 1000
    """Classes are numbers from 0, and below this. The network has one more: the empty class, for guidance."""

    @property
    def clip_frames(self) -> int | None:
        """T of the clips that the network was made for; None of pictures."""
        return None

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    def guided_channels(self, sampler: str) -> int | None:
        """How many channels are guided where nothing else is said; None for all. The published program guides three
        of four, and Open-Sora all of them with its DPM-Solver."""
        return 3 if self.version.network["in_channels"] == 4 and sampler != "dpm-solver" else None


class ClassConfig(DitSettings, ClassSettings, DiffusionConfig):
    """Keys of scripts that train on classes."""

    unused = CAPTION_KEYS
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    sample_steps: Steps = 50
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 4.0
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(DIT_SAMPLERS)] = "ddim"
    """Sampler of those pictures: `iddpm` is the published one, which needs `learn_sigma`."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.sample_sampler == "iddpm" and not self.learn_sigma:
            raise ValueError("sample_sampler: iddpm needs the variance that learn_sigma: true learns; write ddpm")
        return self


class DitConfig(ClassConfig, TechniqueSettings):
    """Keys of `train/train_dit.py`."""
