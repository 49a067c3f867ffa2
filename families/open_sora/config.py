"""Configuration keys that the scripts of Open-Sora 1.2 share."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from families.common.config import DiffusionConfig, VersionSettings
from families.common.precision import Precision
from families.common.prompt_flags import Prompt
from families.open_sora.versions import VERSIONS, Version
from warpcore.clip_keys import ClipKeys
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.frame_masks import check_mask_ratios
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.errors import UserError
from warpcore.idle_keys import Need
from warpcore.keys import Weights

TARGET = "rectified_flows"
"""What the published networks predict."""
DEFAULT_FPS = 24.0
"""Frames per second of what is drawn where nothing says another number."""
PICTURE_FPS = 120.0
"""What the network is told of pictures instead of frames per second."""


class OpenSoraSettings(VersionSettings):
    """Which network of Open-Sora 1.2, and where its parts are.

    `generator_checkpoint_path` takes a published file or folder, a name of the Hugging Face hub
    (`hpcai-tech/OpenSora-STDiT-v3`), a file that a run exported, or a run's folder. A new run goes on from a
    checkpoint of the published program (`epoch0-global_step500`) with its average, and counts its updates.
    """

    needs = {
        "autoencoder_frames": Need(
            "a published model_version: frames of its autoencoder pass one by one",
            lambda config: config.version.is_published,
        )
    }

    model_version: Literal[tuple(VERSIONS)] = "XL/2"
    """Size of the network: `XL/2` has 1.2 billion parameters, `3B/2` has 3.2; `mini` is a toy for clips of 64 px."""
    diffusion_target: Literal["rectified_flows"] | None = None
    """What the network predicts: always the straight flow, from noise to clip as published."""
    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder: that of Open-Sora 1.2 as a file, a folder, or a name of the hub; or an AutoencoderKLWan in a
    file that holds its config, or a folder of diffusers. By default hpcai-tech/OpenSora-VAE-v1.2, and for
    `model_version: mini` the one that ships."""
    autoencoder_precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says; the published program takes bfloat16."""
    autoencoder_frames: PositiveInt = 4
    """Frames that pass the spatial part of the autoencoder at a time: fewer need less memory."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoder: T5 v1.1 XXL, as a folder of transformers or a name of the hub; by default
    DeepFloyd/t5-v1_1-xxl, and for `model_version: mini` the one that ships. A run whose caches have all texts needs
    none."""
    text_encoder_precision: Precision = "bfloat16"
    """What the text encoder is kept and computed in: 10 GB in bfloat16, 3 GB in `nf4` (needs torchao)."""
    use_timestep_transform: bool = True
    """More noise for larger and longer clips, as published: times are shifted by sqrt(height x width / 512^2 x latent
    frames)."""

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]


class OpenSoraConfig(OpenSoraSettings, ClipKeys, DiffusionConfig):
    """Keys of the scripts that train."""

    unused = frozenset({"masked_loss"})
    needs = dict.fromkeys(
        ("logit_mean", "logit_std"),
        Need("timestep_sampling: logit_normal", lambda config: config.timestep_sampling == "logit_normal"),
    )

    caption_dropout: Share = 0.1
    """Share of the captions whose states are replaced by the network's own empty text, for guidance."""
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    mask_ratios: dict[str, float] = {}
    """Shares of the clips of which some frames are given, and not learned, by name: `random`, `intepolate` (every
    second), `quarter_random`, `quarter_head`, `quarter_tail`, `quarter_head_tail`, `image_random`, `image_head`,
    `image_tail`, `image_head_tail`, and `identity` (none is given), which also has what they lack to 1. Frames are
    those of the latents."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn: more of the middle ones, as in the published configs of 1.2, or all alike."""
    logit_mean: float = 0.0
    """Mean of log(t / (1 - t)), t being the share of the noise."""
    logit_std: PositiveFloat = 1.0
    """Its deviation."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts."""
    sequence_shards: PositiveInt = 1
    """How many neighbouring processes compute each clip together, each a part of the patches of every frame (sequence
    parallelism): for clips whose activations are too large for one GPU. It divides the processes, and the heads of the
    attention; `batch_size` is shared by as many times fewer. Results are those of one process; a run may go on with
    another number."""
    sample_prompts: list[Prompt] = []
    """Captions to draw at every save, at the size of the largest bucket of clips; without them those of held-out
    samples, or else of a few training samples, are taken."""
    sample_steps: Steps = 30
    """Sampling steps of the clips drawn at every save."""
    sample_guidance: float = 7.0
    """Classifier-free guidance of those clips."""
    sample_sampler: Literal[tuple(SAMPLERS)] = "euler"
    """Sampler of those clips: `euler` is the published one, and the same as `ddim` here."""

    @property
    def processes_per_sample(self) -> int:
        return self.sequence_shards

    @model_validator(mode="after")
    def _blocks_exchange_tokens(self) -> Self:
        if self.compile and self.sequence_shards > 1:
            raise ValueError("sequence_shards: what processes exchange inside a block can't be compiled; remove one")
        return self

    @model_validator(mode="after")
    def _masks_are_known(self) -> Self:
        try:
            check_mask_ratios(self.mask_ratios)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self
