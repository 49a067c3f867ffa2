"""Configuration keys that the scripts of Open-Sora share."""

from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from families.common.config import DiffusionConfig, VersionSettings
from families.common.precision import Precision
from families.common.prompt_flags import Prompt
from families.open_sora.versions import FLOW, NOISE, VERSIONS, Version
from modules.stdit import STDiT
from warpcore.clip_keys import ClipKeys
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.frame_masks import IDENTITY, check_mask_ratios
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import DIT_SAMPLERS, SAMPLERS
from warpcore.errors import UserError
from warpcore.idle_keys import Need
from warpcore.keys import Weights

PICTURE_FPS = 120.0
"""What the network is told of pictures instead of frames per second."""
OF_FLOWS = Need("a model_version of Open-Sora 1.2", lambda config: config.version.target == FLOW)
OF_STDIT = Need("a model_version of Open-Sora 1.0", lambda config: config.version.kind is STDiT)
MISSPELT = {"dmp-solver": "dpm-solver"}
"""Samplers as the published page of commands spells them."""


class OpenSoraSettings(VersionSettings):
    """Which network of Open-Sora, and where its parts are.

    `generator_checkpoint_path` takes a published file or folder, a name of the Hugging Face hub
    (`hpcai-tech/OpenSora-STDiT-v3`), a file that a run exported, or a run's folder. A new run goes on from a
    checkpoint of the published program (`epoch0-global_step500`) with its average, and counts its updates.
    """

    needs = {
        "autoencoder_frames": Need(
            "a published model_version, or one of Open-Sora 1.0 or 1.1: frames of its autoencoder pass one by one",
            lambda config: config.version.is_published or config.version.target == NOISE,
        ),
        "use_timestep_transform": OF_FLOWS,
        "space_scale": OF_STDIT,
        "time_scale": OF_STDIT,
    }

    model_version: Literal[tuple(VERSIONS)] = "XL/2"
    """The network: of Open-Sora 1.2 `XL/2` with 1.2 billion parameters, or `3B/2` with 3.2; `STDiT2-XL/2` is that of
    1.1, and `STDiT-XL/2` that of 1.0, of 0.8 billion. `mini`, `mini-1.1` and `mini-1.0` are toys for clips of 64
    px."""
    diffusion_target: Literal["epsilon", "rectified_flows"] | None = None
    """What the network predicts: of 1.2 the straight flow, from noise to clip as published, of 1.0 and 1.1 the noise,
    and the variance of steps. It follows from `model_version`."""
    space_scale: PositiveFloat = 0.5
    """Of 1.0: places of a frame are counted in steps of 1 / this, as the published 256 px have it; 1 at 512 px."""
    time_scale: PositiveFloat = 1.0
    """Of 1.0: the same of frames; 2/3 for 64 of them."""
    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder: that of Open-Sora 1.2 as a file, a folder, or a name of the hub; or one of diffusers in a file
    that holds its config, or a folder: AutoencoderKLWan, AutoencoderKL and AutoencoderKLTemporalDecoder, of which the
    last two have latents for each frame. By default hpcai-tech/OpenSora-VAE-v1.2, of 1.0 and 1.1
    stabilityai/sd-vae-ft-ema, and of minis one that ships."""
    autoencoder_precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says; the published program takes bfloat16."""
    autoencoder_frames: PositiveInt = 4
    """Frames that pass the autoencoder, or its spatial part, at a time: fewer need less memory."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoder: T5 v1.1 XXL, as a folder of transformers or a name of the hub; by default
    DeepFloyd/t5-v1_1-xxl, and of minis the one that ships. A run whose caches have all texts needs
    none."""
    text_encoder_precision: Precision = "bfloat16"
    """What the text encoder is kept and computed in: 10 GB in bfloat16, 3 GB in `nf4` (needs torchao)."""
    use_timestep_transform: bool = True
    """Of 1.2: more noise for larger and longer clips, as published: times are shifted by sqrt(height x width / 512^2 x
    latent frames)."""

    @model_validator(mode="after")
    def _target_is_its_own(self) -> Self:
        if self.diffusion_target not in (None, target := self.version.target):
            raise ValueError(
                f"diffusion_target: {self.diffusion_target}, and the network of model_version: {self.model_version} "
                f"predicts {target}; remove the key"
            )
        return self

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    @property
    def is_toy(self) -> bool:
        return not self.version.is_published

    def check_sampler(self, key: str, sampler: str) -> None:
        """Raise ValueError for a sampler of noise and variances where a flow is drawn."""
        if self.version.target == FLOW and sampler in DIT_SAMPLERS.keys() - SAMPLERS.keys():
            raise ValueError(f"{key}: {sampler} is of Open-Sora 1.0 and 1.1; write euler for 1.2")

    def guided_channels(self, sampler: str) -> int | None:
        """How many channels are guided where nothing else is said; None for all. The published program guides three
        of four with `iddpm`."""
        return 3 if self.version.network["in_channels"] == 4 and sampler == "iddpm" else None


def as_published(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Values with the published sampler and number of steps of their `model_version` where they say none.

    keys: what the config calls `sampler` and `steps`.
    """
    version = VERSIONS.get(str(values.get("model_version") or "XL/2"))
    if version is None or version.target == FLOW:
        return values
    sampler = values.get(keys["sampler"])
    sampler = MISSPELT.get(sampler, sampler) if isinstance(sampler, str) else sampler
    steps = 20 if sampler == "dpm-solver" else version.drawn_by["steps"]
    known = {keys["sampler"]: sampler or version.drawn_by["sampler"], keys["steps"]: steps}
    return values | {key: value for key, value in known.items() if key == keys["sampler"] or values.get(key) is None}


class OpenSoraConfig(OpenSoraSettings, ClipKeys, DiffusionConfig):
    """Keys of the scripts that train."""

    unused = frozenset({"masked_loss"})
    needs = {"timestep_sampling": OF_FLOWS} | dict.fromkeys(
        ("logit_mean", "logit_std"),
        Need(
            "timestep_sampling: logit_normal, of Open-Sora 1.2",
            lambda config: config.timestep_sampling == "logit_normal" and config.version.target == FLOW,
        ),
    )

    caption_dropout: Share = 0.1
    """Share of the captions whose states are replaced by the network's own empty text, for guidance."""
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    mask_ratios: dict[str, float] = {}
    """Shares of the clips of which some frames are given, and not learned, by name: `random`, `intepolate` (every
    second), `quarter_random`, `quarter_head`, `quarter_tail`, `quarter_head_tail`, `image_random`, `image_head`,
    `image_tail`, `image_head_tail`, and `identity` (none is given), which also has what they lack to 1. Frames are
    those of the latents. The names of 1.1 are understood, too: `mask_random`, ..., and `mask_no` for `identity`."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn, of 1.2: more of the middle ones, as in the published configs, or all alike."""
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
    """Sampling steps of the clips drawn at every save; by default 100 of `iddpm`, 20 of `dpm-solver`."""
    sample_guidance: float = 7.0
    """Classifier-free guidance of those clips."""
    sample_sampler: Literal[tuple(DIT_SAMPLERS)] = "euler"
    """Sampler of those clips: of 1.2 `euler` is the published one, and the same as `ddim` here; of 1.0 and 1.1 it is
    `iddpm`, which is their default, or `dpm-solver`."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: dict[str, Any]) -> dict[str, Any]:
        ratios = values.get("mask_ratios")
        if isinstance(ratios, dict):  # names of 1.1
            names = {name: str(name).removeprefix("mask_") for name in ratios}
            names = {name: IDENTITY if own == "no" else own for name, own in names.items()}
            if len(set(names.values())) < len(names):
                raise ValueError(f"mask_ratios: {', '.join(map(str, ratios))} name a mask twice; remove one")
            values = values | {"mask_ratios": {names[name]: share for name, share in ratios.items()}}
        return as_published(values, {"sampler": "sample_sampler", "steps": "sample_steps"})

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
        self.check_sampler("sample_sampler", self.sample_sampler)
        return self
