"""Configuration keys that the training scripts of all families of diffusion models share."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from families.common.losses import LossSettings
from families.common.sample_fields import SampleSettings
from warpcore.config import Config, Settings, Share
from warpcore.config_keys import Gigabytes, Steps, may_be_far
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.idle_keys import Need
from warpcore.keys import Place, Weights

Folder = Annotated[Place, Field(min_length=1)]


class GeneratorSettings(Settings):
    """The network that is trained or drawn with.

    A key for weights takes a file, a folder or, where nothing is at that path, a name of the Hugging Face hub:
    `owner/name` or `owner/name/subfolder`, which is downloaded once, into `models/`, and read from there.
    """

    about_network: ClassVar[tuple[str, ...]] = ()
    """Keys of a family that say which network this is. Exported files say them; a file to start from that says
    otherwise is refused."""

    generator_checkpoint_path: Weights | None = None
    """Weights of the network that is trained or drawn with (.safetensors); without it, random ones."""
    diffusion_target: Literal["epsilon", "x0", "v", "rectified_flows"] | None = None
    """What the network predicts: noise, clean latents, v (learns faster from zero), or straight flow. By default what
    its weights file says, or noise where it says nothing (published weights)."""

    @property
    def is_toy(self) -> bool:
        """Whether the network is a toy, of which random weights may be what a LoRA changes."""
        return False


class VersionSettings(GeneratorSettings):
    """A network of one of the sizes that a family's `model_version` names; `mini` is its toy."""

    about_network = ("model_version",)

    @property
    def is_toy(self) -> bool:
        return self.model_version == "mini"


class DiffusionConfig(LossSettings, SampleSettings, GeneratorSettings, Config):
    """What is learned, and what is drawn on the way."""

    needs = {
        "cache_path": Need(
            "data on s3://",
            lambda config: may_be_far(
                config.webdataset_path, config.validation_path, config.caches, config.validation_caches
            ),
        ),
        "cache_text_gb": Need.of("cache_text"),
        "validation_levels": Need(
            "validation_path or validation_samples",
            lambda config: config.validation_path is not None or config.validation_samples > 0,
        ),
        "change_target": Need(
            "diffusion_target, and generator_checkpoint_path with another",
            lambda config: bool(config.diffusion_target and config.generator_checkpoint_path),
        ),
    }

    caches: list[Folder] = []
    """Folders that tools/cache.py made, with features of the samples of `webdataset_path`: `[data/latents,
    data/texts]`. What they hold is not computed again. Without `webdataset_path` (or with null there), the samples are
    those of the first folder, and no pictures are needed."""
    validation_caches: list[Folder] = []
    """Caches of the samples of `validation_path`, as `caches` are of the training data."""
    validation_levels: Annotated[int, Field(ge=0, le=1000)] = 0
    """Validate at this many noise levels, evenly spread over the schedule without its shift, in place of one that is
    drawn for each sample. Noise and crop follow from a sample's key alone, so the mean, `validation_loss`, compares
    runs, and sizes of networks and pictures. Beside it there is the loss of each level, such as
    `validation_loss/level_0.25`, and bucket, `validation_loss/size_512x768`. Takes as many forward passes."""
    change_target: bool = False
    """Allow another `diffusion_target` than the weights file to start from says; the network then learns it."""
    caption_dropout: Share = 0.05
    """Share of the captions replaced by an empty one, so that guidance has something to compare with."""
    cache_text: bool = False
    """Keep the text conditions of captions in the CPU's memory after their first use: for sets of few captions."""
    cache_text_gb: Gigabytes = 4
    """What they may take there, in units of 10^9 bytes and per process."""
    shift: PositiveFloat = 1.0
    """Moves the training noise to more (> 1) or less; larger latents want more."""
    sample_steps: Steps = 20
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 5.0
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """Sampler of those pictures."""
    sample_count: PositiveInt = 8
    """How many pictures are drawn at most."""

    @model_validator(mode="before")
    @classmethod
    def _samples_of_caches(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Where only caches are named, the first one says which samples there are, and has their captions."""
        for key, caches in (("webdataset_path", "caches"), ("validation_path", "validation_caches")):
            # On a command line, null is text to a key that takes text.
            if values.get(key) in (None, "", [], "null") and (named := values.get(caches)):
                first = named[0] if isinstance(named, list) else named
                if first and isinstance(first, str | Path):  # what else is written there is the mistake of its own key
                    values = values | {key: first}
        return values
