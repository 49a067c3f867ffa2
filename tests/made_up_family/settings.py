"""Keys of the made-up family, its networks and its diffusion process."""

from pathlib import Path

from pydantic import PositiveInt

from families.common.config import GeneratorSettings
from families.common.weights import with_weights
from tests.made_up_family.networks import Cloud, LetterCount, Squeeze
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import discrete_process


class MadeUpSettings(GeneratorSettings):
    """The networks of the made-up family."""

    about_network = ("cloud_width",)

    cloud_width: PositiveInt = 8
    """Channels of the denoiser."""
    squeeze_path: Path
    """Weights of the autoencoder."""
    letters_path: Path
    """Weights of the text encoder."""


def cloud(settings: MadeUpSettings) -> Cloud:
    path = settings.generator_checkpoint_path
    return with_weights(lambda: Cloud(settings.cloud_width), path, "generator_checkpoint_path", deferrable=True)


def squeeze(settings: MadeUpSettings) -> Squeeze:
    return with_weights(Squeeze, settings.squeeze_path, "squeeze_path")


def letters(settings: MadeUpSettings) -> LetterCount:
    return with_weights(LetterCount, settings.letters_path, "letters_path")


def process(settings: MadeUpSettings, loss_weight: str = "constant") -> GDF:
    return discrete_process("linear", settings.diffusion_target, loss_weight, steps=100)
