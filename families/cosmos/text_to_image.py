"""Pictures for prompts by Cosmos-Predict2: out of a run, a published file, or a folder of diffusers."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from families.common.text_to_image import Drawn, TextToImageConfig
from families.common.transformer_lora import open_loras
from families.cosmos import build
from families.cosmos.drawing import CosmosNetworks
from families.cosmos.inference import CosmosInferenceSettings
from families.cosmos.sampling import MAX_SEED, published_noise
from families.cosmos.training import TEXT
from warpcore.config_keys import SidePx, Steps
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.errors import UserError
from warpcore.keys import Place

MINI_SIZE_PX = 128
"""Side of the mini's pictures."""


class CosmosTextToImageConfig(CosmosInferenceSettings, TextToImageConfig):
    """Keys of `inference/text_to_image.py` for Cosmos-Predict2."""

    image_size: SidePx | None = None
    """Side of a square picture in pixels; other shapes get about the same area, with `aspect_ratio: 16:9` 768 x 1360.
    By default that of the training: 1024."""
    steps: Steps = 35
    """Sampling steps; the network is asked once more than that."""
    guidance: NonNegativeFloat | None = 5.0
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder. 5 is what
    the published program calls 4."""
    sampler: Literal[tuple(SAMPLERS)] = "res_2m"
    """By default what was published; any steps along the same noise levels."""
    distill_steps: Annotated[int, Field(ge=0, le=4)] = 0
    """Draw in 1 to 4 steps without guidance: for distilled networks alone (`model_distilled.pt` of 0.6B)."""
    lora: list[Place] = []
    """LoRAs, as WEIGHTS or WEIGHTS:STRENGTH (1 by default): files in diffusers', ComfyUI's, published or our names, a
    LoRA's run, or names of the Hugging Face hub."""
    tiled_decoding: bool = False
    """Decode in overlapping tiles, which bounds the memory of large pictures."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the denoiser: give run or generator_checkpoint_path")
        if self.negative_prompt and (self.guidance in (None, 1) or self.distill_steps):
            raise ValueError("negative_prompt: without guidance, or with distill_steps, it has no effect")
        if self.distill_steps and self.model_fields_set & {"steps", "guidance", "sampler"}:
            raise ValueError("distill_steps fixes steps, guidance and sampler; remove these")
        if wrong := [seed for seed in self.seeds if not 0 <= seed <= MAX_SEED]:
            raise ValueError(f"seeds: {wrong[0]}; write numbers from 0 to {MAX_SEED}")
        return self

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures: what `size` says, else published sizes: multiples of 16 px with at most the area."""
        if self.size:
            return self.size
        side = self.image_size or (MINI_SIZE_PX if self.model_version == "mini" else 1024)
        ratio = self.aspect_ratio or self.default_aspect_ratio
        height, width = (max(int(one / 16) * 16, 16) for one in (side / ratio**0.5, side * ratio**0.5))
        return height, width


class CosmosTextToImage:
    """Draws with a whole Cosmos-Predict2; see `families.common.text_to_image.TextToImage`."""

    Config = CosmosTextToImageConfig
    num_conditions = 0

    def __init__(self, config: CosmosTextToImageConfig):
        self.config = config
        self.networks = CosmosNetworks(config, open_loras(build.transformer, config.lora, config, config.use_ema))
        compression, numbers = build.latents_of(config)[1], build.transformer_numbers(config)
        factor, most = compression * numbers["patch_size"][1], compression * numbers["max_size"][1]
        if any(side % factor or side > most for side in config.size_px):
            height, width = config.size_px
            raise UserError(
                f"size: {height} x {width} px (height x width); sides have to be multiples of {factor} px, and at "
                f"most {most}"
            )
        build.check_fits(config, "autoencoder", "text")
        self.channels = numbers["in_channels"]
        self.latent_size = tuple(side // compression for side in config.size_px)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed."""
        config = self.config
        texts = list(dict.fromkeys([*prompts, config.negative_prompt]))
        read = self.networks.read(texts)[TEXT]
        sides = [{TEXT: read[[texts.index(text) for text in side]]} for side in (prompts, [config.negative_prompt])]
        guidance = None if config.guidance == 1 or config.distill_steps else config.guidance
        shape = (self.channels, *self.latent_size)
        latents = self.networks.draw(
            *sides, self.latent_size, seeds, noise=published_noise(seeds, shape), guidance=guidance,
            steps=config.distill_steps or config.steps, distilled=config.distill_steps > 0,
            sampler="lcm" if config.distill_steps else config.sampler, shift=config.shift,
        )  # fmt: skip
        return Drawn(self.networks.decode(latents, config.tiled_decoding))

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
