"""Configuration keys that the scripts of NOVA share."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from families.common.class_keys import CAPTION_KEYS, ClassCount, ClassSettings, NamedClasses
from families.common.config import DiffusionConfig, VersionSettings
from families.common.precision import Precision
from families.nova.loss import LOSS_REPEAT
from families.nova.versions import EPSILON, FLOW, VERSIONS, Version
from warpcore.clip_keys import ClipKeys
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.idle_keys import Need
from warpcore.keys import Weights

MAX_RANK = 65_536
TEXT_KEYS = (
    *sorted(CAPTION_KEYS - {"cache_text_gb", "keep_tags", "tag_separator"}),
    "sample_prompts",
    "text_encoder_checkpoint_path",
)
"""Keys about texts that need no other one of these."""


class NovaSettings(NamedClasses, VersionSettings):
    """Which network of NOVA, and where its parts are.

    `generator_checkpoint_path` takes a published folder (`transformer`, or a pipeline's that has it), a name of the
    Hugging Face hub (`BAAI/nova-d48w768-sdxl1024`), a file that a run exported, or a run's folder.
    """

    about_network = ("model_version", "video_mixer_rank", "rotary_pos_embed")
    needs = {
        "shift": Need(
            f"diffusion_target: {FLOW}",
            lambda config: (config.diffusion_target or config.version.target) == FLOW,
        )
    }

    model_version: Literal[tuple(VERSIONS)] = "d48w1024-sdxl1024"
    """Which network, as published: 0.3, 0.6 or 1.4 billion parameters for pictures of 1,024 px (`d48w768-sdxl1024`,
    `d48w1024-sdxl1024`, `d48w1536-sdxl1024`), 0.6 for 512 px (`d48w1024-sd512`) or for clips (`d48w1024-osp480`);
    `mini` and `mini-video` are toys."""
    diffusion_target: Literal[EPSILON, FLOW] | None = None
    """What the diffusion of a token is: noise is predicted at 1,000 times (`epsilon`, DDPM), or a straight flow. By
    default what published networks of the size do: those for 512 px and for clips `epsilon`, others flow."""
    shift: PositiveFloat = 1.0
    """Moves the times of the flow towards more noise (> 1), in training and in drawing."""
    num_classes: ClassCount | None = None
    """The network is told a class in place of a text: numbers from 0, and below this. Of pictures alone, as
    published."""
    video_mixer_rank: Annotated[int, Field(ge=-1, le=MAX_RANK)] = 0
    """Rank of layers by which a frame scales and shifts what was made of the first one; 0: there are none, -1: a
    single layer of full rank."""
    rotary_pos_embed: bool = False
    """Turn queries and keys by their places in place of adding sines: then pictures may have several sizes. Published
    networks have sines."""
    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder: an AutoencoderKL, AutoencoderKLOpenSora or AutoencoderKLWan, as a folder (also a pipeline's), a
    file that holds its config, or a name of the hub. By default that of the published network on the hub, and for the
    minis the ones that ship."""
    autoencoder_precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoder: Phi-2, or a T5, as a folder of transformers (also a pipeline's) or a name of the hub. By
    default that of the published network on the hub, and for the minis the T5 that ships. A run whose caches have all
    texts needs none."""
    text_encoder_precision: Precision = "bfloat16"
    """What the text encoder is kept and computed in."""

    @model_validator(mode="after")
    def _classes_of_pictures(self) -> Self:
        if self.num_classes is not None and self.version.draws_clips:
            raise ValueError(
                f"num_classes: model_version {self.model_version} draws clips, which NOVA learns from texts alone: "
                "write num_classes: null, or a model_version of pictures"
            )
        return self

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    @property
    def is_toy(self) -> bool:
        return not self.version.is_published

    @property
    def target(self) -> str:
        """What the network predicts."""
        return self.diffusion_target or self.version.target


class NovaConfig(NovaSettings, ClassSettings, ClipKeys, DiffusionConfig):
    """Keys of `train/train_nova.py`."""

    unused = frozenset({
        "masked_loss", "offset_noise", "multires_noise_iterations", "multires_noise_discount", "input_perturbation",
        "adaptive_loss_weight", "sample_sampler",
    })  # fmt: skip
    needs = {
        "learn_first_frame": Need("clips of several frames", lambda config: config.num_frames != 1),
        "motion_column": Need("a model_version of clips", lambda config: config.version.draws_clips),
        "sample_flow": Need.of("motion_column"),
        **dict.fromkeys(("class_getter", "class_dropout", "sample_classes"), Need.of("num_classes")),
        **dict.fromkeys(TEXT_KEYS, Need("num_classes: null", lambda config: config.num_classes is None)),
    }

    caption_dropout: Share = 0.1
    """Share of the captions that are replaced by the empty text, for guidance."""
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    loss_repeat: Annotated[int, Field(gt=0, le=256)] = LOSS_REPEAT
    """Draws of noise and times for each token of a picture, all with one pass of the encoders."""
    learn_first_frame: bool = True
    """Learn to draw the first frame of a clip, too; without that a run learns to go on from a given picture alone."""
    motion_column: str | None = None
    """Index column with the motion score of each clip, such as `flow`, that the network is told; without it, it is
    told nothing of motion."""
    loss_weight: Literal[tuple(sorted(LOSS_WEIGHTS.keys() - {"adaptive"}))] = "constant"
    """How much the loss of each noise level counts."""
    sample_prompts: list[str] = []
    """Captions to draw at every save, at the size of the largest bucket; without them those of held-out samples, or
    else of a few training samples, are taken."""
    sample_groups: Steps = 64
    """Groups in which the tokens of a frame are drawn, each after the one before."""
    sample_steps: Steps = 25
    """Steps of the diffusion of each group."""
    sample_guidance: float = 5.0
    """Classifier-free guidance of what is drawn at every save."""
    sample_flow: float = 5.0
    """Motion score that clips drawn for `sample_prompts` are told, where the network is told any."""
