"""Configuration keys that the scripts of Cosmos-Predict2 share."""

from typing import Literal

from pydantic import PositiveFloat

from families.common.config import DiffusionConfig, VersionSettings
from families.common.precision import Precision
from families.common.prompt_flags import Prompt
from families.common.techniques.config import TechniqueSettings
from families.cosmos.versions import VERSIONS, Version
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.idle_keys import Need
from warpcore.keys import Weights

TARGET = "rectified_flows"
"""What the published networks predict."""


class CosmosSettings(VersionSettings):
    """Which Cosmos-Predict2 Text2Image, and where its networks are.

    Each key for weights takes a pipeline of diffusers (a folder), the folder of that network alone, a published file
    (`model.pt`) or folder, a published training run's folder, a file that a run exported, or a name of the Hugging
    Face hub.
    """

    model_version: Literal["0.6B", "2B", "14B", "mini"] = "2B"
    """Size of the network; `mini` is a toy for 128 px pictures."""
    diffusion_target: Literal["rectified_flows"] | None = None
    """What the network predicts: always the straight flow from picture to noise."""
    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder (Wan 2.1): `tokenizer.pth`, or a folder; by default what stands beside the denoiser."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoder: the first T5 of 11 billion parameters (`google-t5/t5-11b`); by default what stands beside the
    denoiser. A run whose caches have all texts needs none."""
    autoencoder_precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says; the published program takes bfloat16."""
    text_encoder_precision: Precision = "bfloat16"
    """What the text encoder is kept and computed in: 10 GB in bfloat16, 3 GB in `nf4` (needs torchao)."""

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    @property
    def takes_average(self) -> bool:
        """Whether the average is read of a published file that has it beside the weights."""
        return False


class CosmosConfig(CosmosSettings, TechniqueSettings, DiffusionConfig):
    """Keys of the scripts that train."""

    needs = {"start_from_ema": Need.of("generator_checkpoint_path")}

    start_from_ema: bool = False
    """Start from the average (`net_ema.`) in a published file that has it beside the weights."""
    caption_dropout: Share = 0.2
    """Share of the captions replaced by the empty condition, which is zeros, so that guidance has something to compare
    with."""
    loss_scale: PositiveFloat = 10.0
    """The loss is multiplied by this, as in the published runs: it matters for clipping (`clip_grad_norm`)."""
    loss_reduce: Literal["mean", "sum"] = "mean"
    """The mean of the squared error over everything; or over all but the channels, whose errors are summed."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts. `snr_plus_one` is what published runs before 2025-08-29 had:
    t^2 + (1 - t)^2 of the flow's error."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn: more of the middle ones, as published, or all alike."""
    sample_prompts: list[Prompt] = []
    """Captions to draw at every save; without them those of held-out samples, or else of a few training samples, are
    taken."""
    sample_steps: Steps = 35
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 5.0
    """Classifier-free guidance of those pictures: 5 is what the published program calls 4."""
    sample_sampler: Literal[tuple(SAMPLERS)] = "res_2m"
    """Sampler of those pictures."""

    @property
    def takes_average(self) -> bool:
        return self.start_from_ema
