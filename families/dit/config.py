"""Configuration keys of DiT, and those that the other networks on the same latents share with it."""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from families.common.config import DiffusionConfig, VersionSettings
from families.common.techniques.config import TechniqueSettings
from families.dit.classes import class_number
from families.dit.versions import VERSIONS, Version
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.keys import Weights

CAPTION_KEYS = frozenset({
    "captions_getter", "caption_templates", "caption_dropout", "cache_text", "shuffle_tags", "tag_dropout",
    "cache_text_gb", "keep_tags", "tag_separator",
})  # fmt: skip
"""Keys of other scripts, for which a network without texts has no use."""
MAX_CLASSES = 1_000_000


class LatentSettings(VersionSettings):
    """The autoencoder whose latents are drawn."""

    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder: a folder of diffusers, a file that holds its config, or a name of the Hugging Face hub; by
    default stabilityai/sd-vae-ft-ema, and for `model_version: mini` the one that ships."""
    autoencoder_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says."""


class DitSettings(LatentSettings):
    """Which DiT, and of which classes.

    `generator_checkpoint_path` takes a published file (`DiT-XL-2-256x256.pt`), a file that a run exported, or a run's
    folder.
    """

    model_version: Literal[tuple(VERSIONS)] = "XL/2"
    """Size of the network; `mini` is a toy for 128 px pictures."""
    learn_sigma: bool = True
    """Predict the variance of each step too, as published networks do: the output has twice the channels."""
    num_classes: Annotated[int, Field(gt=0, le=MAX_CLASSES)] = 1000
    """Classes are numbers from 0, and below this. The network has one more: the empty class, for guidance."""
    class_names: list[str] = []
    """The name of each class, in order, where samples and drawings call classes by name; says `num_classes` too."""

    @model_validator(mode="before")
    @classmethod
    def _names_are_counted(cls, values: dict[str, Any]) -> dict[str, Any]:
        names = values.get("class_names")
        if isinstance(names, list) and names and values.get("num_classes") is None:
            values = values | {"num_classes": len(names)}
        return values

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> Self:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names: {len(self.class_names)} names for {self.num_classes} classes (num_classes); leave "
                "num_classes out, or name every class"
            )
        if len(set(self.class_names)) < len(self.class_names):
            twice = Counter(self.class_names).most_common(1)[0][0]
            raise ValueError(f"class_names: {twice!r} names two classes")
        return self

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


class ClassConfig(DitSettings, DiffusionConfig):
    """Keys of scripts that train on classes."""

    unused = CAPTION_KEYS
    class_getter: tuple[str, str] = ("cls", "identity")
    """Member and expression that give the class of a sample, its number or one of `class_names`: `['json', 'lambda j:
    j["label"]']`. `key` stands for the sample's key: `['key', 'lambda k: k.split("/")[0]']`."""
    class_dropout: Share = 0.1
    """Share of the samples whose class is replaced by the empty one, for guidance."""
    latent: Literal["sample", "mean"] = "sample"
    """What of the autoencoder's moments is learned: a draw from them, as published, or their mean."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    sample_classes: list[int | str] = []
    """Classes to draw at every save, as numbers or by name; without them those of held-out samples, or else of a few
    training samples, are taken."""
    sample_steps: Steps = 50
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 4.0
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(DIT_SAMPLERS)] = "ddim"
    """Sampler of those pictures: `iddpm` is the published one, which needs `learn_sigma`."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        try:
            _ = self.sample_numbers
        except ValueError as error:
            raise ValueError(f"sample_classes: {error}") from None
        if self.sample_sampler == "iddpm" and not self.learn_sigma:
            raise ValueError("sample_sampler: iddpm needs the variance that learn_sigma: true learns; write ddpm")
        return self

    @property
    def sample_numbers(self) -> list[int]:
        """The numbers of `sample_classes`."""
        return [class_number(one, self.num_classes, self.class_names) for one in self.sample_classes]


class DitConfig(ClassConfig, TechniqueSettings):
    """Keys of `train/train_dit.py`."""
