"""Pictures for prompts by PixArt-alpha: out of a run, a published file, or a folder of diffusers."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from families.common.text_to_image import Drawn, TextToImageConfig
from families.common.transformer_lora import open_loras
from families.dit import pixart_build
from families.dit.autoencoder import latents_of
from families.dit.pixart_drawing import PixartNetworks
from families.dit.pixart_inference import PixartInferenceSettings
from warpcore.config_keys import SidePx, Steps
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.errors import UserError
from warpcore.keys import Place


class PixartTextToImageConfig(PixartInferenceSettings, TextToImageConfig):
    """Keys of `inference/text_to_image.py` for PixArt-alpha."""

    image_size: SidePx | None = None
    """Side of a square picture in pixels; other shapes get about the same area. By default that of the training."""
    steps: Steps = 20
    """Sampling steps."""
    guidance: NonNegativeFloat | None = 4.5
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder."""
    guidance_channels: PositiveInt | None = None
    """Guide the first of this number of channels only. By default as published: three of four for `iddpm`, else all
    of them."""
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

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of this."""
        return latents_of(self)[1] * self.version.network["patch_size"]

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures: what `size` says, else sides that the network can draw, of about the area."""
        if self.size:
            return self.size
        side, ratio = self.image_size or self.version.image_size, self.aspect_ratio or self.default_aspect_ratio
        height, width = (
            max(round(one / self.factor), 1) * self.factor for one in (side / ratio**0.5, side * ratio**0.5)
        )
        return height, width


class PixartTextToImage:
    """Draws with a whole PixArt-alpha; see `families.common.text_to_image.TextToImage`."""

    Config = PixartTextToImageConfig
    num_conditions = 0

    def __init__(self, config: PixartTextToImageConfig):
        self.config, self.size = config, config.size_px
        if any(side % config.factor for side in self.size):
            height, width = self.size
            raise UserError(f"size: {height} x {width} px (height x width); sides are multiples of {config.factor} px")
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
