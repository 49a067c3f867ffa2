"""Pictures for prompts by PixArt-alpha: out of a run, a published file, or a folder of diffusers."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import NonNegativeFloat, model_validator

from families.common.text_to_image import Drawn, TextToImageConfig
from families.common.transformer_lora import open_loras
from families.dit import pixart_build
from families.dit.picture_size import PictureSizeSettings
from families.dit.pixart_drawing import PixartNetworks
from families.dit.pixart_inference import PixartInferenceSettings
from warpcore.config_keys import Steps
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.keys import Place


class PixartTextToImageConfig(PictureSizeSettings, PixartInferenceSettings, TextToImageConfig):
    """Keys of `inference/text_to_image.py` for PixArt-alpha."""

    steps: Steps = 20
    """Sampling steps."""
    guidance: NonNegativeFloat | None = 4.5
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder."""
    sampler: Literal[tuple(DIT_SAMPLERS)] = "dpm-solver"
    """By default what was published; `iddpm` draws with the learned variance."""
    lora: list[Place] = []
    """LoRAs, as WEIGHTS or WEIGHTS:STRENGTH (1 by default): files in diffusers', kohya's or our names, a LoRA's run,
    or names of the Hugging Face hub."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the denoiser: give run or generator_checkpoint_path")
        if self.negative_prompt and self.guidance in (None, 1):
            raise ValueError("negative_prompt: without guidance it has no effect")
        return self


class PixartTextToImage:
    """Draws with a whole PixArt-alpha; see `families.common.text_to_image.TextToImage`."""

    Config = PixartTextToImageConfig
    num_conditions = 0

    def __init__(self, config: PixartTextToImageConfig):
        self.config, self.size = config, config.size_px
        self.networks = PixartNetworks(config, open_loras(pixart_build.denoiser, config.lora, config, config.use_ema))

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed."""
        config = self.config
        latents = self.networks.draw(
            prompts, config.negative_prompt, self.size, seeds, steps=config.steps, sampler=config.sampler,
            guidance=None if config.guidance == 1 else config.guidance, shift=config.shift,
            guidance_channels=config.guidance_channels or config.guided_channels(config.sampler),
        )  # fmt: skip
        return Drawn(self.networks.decode(latents))

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
