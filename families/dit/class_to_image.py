"""Pictures of classes by a DiT, and clips by a Latte: out of a run, or a published file."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import NonNegativeFloat, model_validator

from families.common.class_to_image import ClassToImageConfig
from families.common.classes import title_of
from families.common.drawn_pictures import Drawn
from families.common.weight_files import GENERATOR
from families.dit import build
from families.dit.drawing import DitNetworks
from families.dit.files import dit_numbers
from families.dit.inference import DitInferenceSettings
from families.dit.picture_size import PictureSizeSettings
from warpcore.config_keys import Steps
from warpcore.diffusion.samplers import DIT_SAMPLERS


class DitClassToImageConfig(PictureSizeSettings, DitInferenceSettings, ClassToImageConfig):
    """Keys of `inference/class_to_image.py` for DiT."""

    steps: Steps = 250
    """Sampling steps; 50 are enough for a look, and 20 for `dpm-solver`."""
    guidance: NonNegativeFloat | None = 4.0
    """Classifier-free guidance: 1 follows the class as trained and computes none, more follows it harder."""
    sampler: Literal[tuple(DIT_SAMPLERS)] | None = None
    """By default what was published: `iddpm`, or `ddpm` for a network without a learned variance. `ddim` draws without
    further noise, `dpm-solver` in the fewest steps."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the denoiser: give run or generator_checkpoint_path")
        if self.sampler == "iddpm" and not self.learn_sigma:
            raise ValueError("sampler: iddpm needs a network that learned variances; this one did not: write ddpm")
        return self

    @property
    def drawn_size(self) -> tuple[int, ...]:
        """(H, W) of the pictures in px, or (T, H, W) of the clips."""
        return self.size_px

    @property
    def used_sampler(self) -> str:
        return self.sampler or ("iddpm" if self.learn_sigma else "ddpm")

    @property
    def trained_size(self) -> int:
        return self.trained_px


class DitClassToImage:
    """Draws with a DiT and its autoencoder; see `families.common.class_to_image.ClassToImage`."""

    Config = DitClassToImageConfig
    networks_of = DitNetworks

    def __init__(self, config: DitClassToImageConfig):
        build.check_network(dit_numbers(config.generator_checkpoint_path, GENERATOR), config)
        self.config, self.size = config, config.drawn_size
        self.labels = config.labels
        self.titles = [title_of(label, config.class_names) for label in self.labels]
        self.networks = self.networks_of(config)

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> Drawn:
        config, sampler = self.config, self.config.used_sampler
        latents = self.networks.draw(
            labels, self.size, seeds, steps=config.steps, sampler=sampler, shift=config.shift,
            guidance=None if config.guidance == 1 else config.guidance,
            guidance_channels=config.guidance_channels or config.guided_channels(sampler),
        )  # fmt: skip
        return Drawn(self.networks.decode(latents))

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
