"""Configuration keys that the scripts of PixArt-alpha share."""

from typing import Literal, Self

from pydantic import model_validator

from families.common.config import DiffusionConfig
from families.common.precision import Precision
from families.common.prompt_flags import Prompt
from families.common.techniques.config import TechniqueSettings
from families.dit.config import LatentSettings
from families.dit.pixart_versions import VERSIONS, TextVersion
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.keys import Weights


class PixartSettings(LatentSettings):
    """Which PixArt-alpha, and where its networks are.

    `generator_checkpoint_path` takes a published file (`PixArt-XL-2-512x512.pth`), a pipeline of diffusers, the folder
    of the network alone, a file that a run exported, or a name of the Hugging Face hub.
    """

    model_version: Literal[tuple(VERSIONS)] = "XL/2-512"
    """Network and picture size; `mini` is a toy for 128 px pictures."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoder: T5 v1.1 XXL, as a folder of transformers or a name of the hub; by default
    DeepFloyd/t5-v1_1-xxl, and for `model_version: mini` the one that ships. A run whose caches have all texts needs
    none."""
    text_encoder_precision: Precision = "bfloat16"
    """What the text encoder is kept and computed in: 10 GB in bfloat16, 3 GB in `nf4` (needs torchao)."""
    clean_captions: bool | None = True
    """Clean captions and prompts before T5 reads them, as for published weights: without links, markup, file names,
    Chinese characters. `false` only puts them in lower case, and `null` leaves them as they are. Caches of texts are
    made for one of these."""

    @property
    def version(self) -> TextVersion:
        return VERSIONS[self.model_version]

    @property
    def learn_sigma(self) -> bool:
        """Whether the variance of each step is predicted too, as in all published networks."""
        return True

    def guided_channels(self, sampler: str) -> int | None:
        """How many channels are guided where nothing else is said; None for all. The published program guides three
        of four with its `iddpm`, which is DiT's, and all of them with DPM-Solver."""
        return 3 if self.version.network["in_channels"] == 4 and sampler == "iddpm" else None


class PixartConfig(PixartSettings, TechniqueSettings, DiffusionConfig):
    """Keys of the scripts that train."""

    caption_dropout: Share = 0.1
    """Share of the captions whose states are replaced by the network's own empty text, for guidance."""
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    size_condition: Literal["source", "bucket"] = "source"
    """The size that a network of 1024-MS is told: that of the whole picture, as published, or that of its bucket. The
    aspect ratio is always the bucket's."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    sample_prompts: list[Prompt] = []
    """Captions to draw at every save; without them those of held-out samples, or else of a few training samples, are
    taken."""
    sample_steps: Steps = 20
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 4.5
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(DIT_SAMPLERS)] = "dpm-solver"
    """Sampler of those pictures."""

    @model_validator(mode="after")
    def _sizes_are_told(self) -> Self:
        if self.size_condition == "bucket" and not self.version.sees_sizes:
            raise ValueError(f"size_condition: PixArt-{self.model_version} is told no sizes; remove it")
        return self
