"""Pictures for prompts by Stable Diffusion 1.5 or SDXL: out of a run, official files in one file or a folder.

Prompts are taken as they are written: weights as in `(word:1.2)` are read as text, brackets and numbers included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from families.common.drawn_pictures import GUIDED
from families.common.pictures import read_picture, size_of
from families.common.prompt_flags import Prompt
from families.common.text_to_image import Drawn, TextToImageConfig
from families.stable_diffusion import build
from families.stable_diffusion.drawing import StableDiffusionNetworks, time_ids
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.lora import open_loras
from warpcore.config import Share
from warpcore.config_keys import SidePx, Steps
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.diffusion.times import Spacing, last_part
from warpcore.errors import UserError
from warpcore.files import why_no_file
from warpcore.keys import Place

IMAGE_SIZE = {"sd15": 512, "sdxl": 1024, "mini": 128}
"""Side of the squares that a version was trained with."""
PUBLISHED = {"sd15": ("pndm", 7.5), "sdxl": ("euler", 5.0), "mini": ("ddim", 5.0)}
"""Sampler and guidance that a version was published with."""


class SdTextToImageConfig(SdInferenceSettings, TextToImageConfig):
    """Keys of `inference/text_to_image.py` for Stable Diffusion."""

    needs = {"guidance_rescale": GUIDED}

    image_size: SidePx | None = None
    """Side of a square picture in pixels; other shapes get about the same area. By default that of the training: 512
    for 1.5, 1024 for SDXL."""
    steps: Steps = 30
    """Sampling steps; published pipelines take 50."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder. By default
    what was published: 7.5 for 1.5, 5 for SDXL."""
    sampler: Literal[tuple(SAMPLERS)] | None = None
    """By default what was published: `pndm` for 1.5, `euler` for SDXL; `ddim` for zero terminal SNR. `dpmpp_2m`,
    `unipc` and `heun` need the fewest steps; `euler_ancestral`, `dpmpp_2m_sde`, `ddpm` and `lcm` add noise in each."""
    karras: bool = False
    """Space the noise levels as Karras et al. do (arXiv:2206.00364): for euler, euler_ancestral, heun, dpmpp_2m,
    dpmpp_2m_sde and unipc."""
    timestep_spacing: Spacing | None = None
    """Which timesteps are taken (arXiv:2305.08891, table 2). By default `leading`, `linspace` for dpmpp_2m and unipc,
    `trailing` for zero terminal SNR and lcm."""
    guidance_rescale: Share = 0.0
    """Share of the guided prediction that is scaled back to the contrast of the unguided one (arXiv:2305.08891,
    section 3.4): 0.7 for networks trained with zero terminal SNR; 0 for none."""
    negative_prompts: list[Prompt] = []
    """One for each prompt, instead of `negative_prompt`."""
    init_image: Path | None = None
    """A picture to start from instead of noise; it is scaled and cropped to the size that is drawn."""
    strength: Share = 0.8
    """With `init_image`: how far to go away from it, as the share of the steps that are made (1: all)."""
    lora: list[Place] = []
    """LoRAs, as WEIGHTS or WEIGHTS:STRENGTH (1 by default): files in kohya's, diffusers' or our names, a LoRA's run,
    or names of the Hugging Face hub; textual-inversion embeddings, and folders of them, too."""
    original_size: tuple[PositiveInt, PositiveInt] | None = None
    """SDXL: [height, width] of the picture that it is told to draw; small ones are blurred as small pictures of the
    training data were when they were scaled up. By default the size that is drawn."""
    crop: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """SDXL: [top, left] of the crop that it is told to draw; with [0, 0], objects are in the middle."""
    tiled_decoding: bool = False
    """Decode in overlapping tiles, which bounds the memory of large pictures."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the U-Net: give run or generator_checkpoint_path")
        if self.init_image is not None and (problem := why_no_file(self.init_image)):
            raise ValueError(f"init_image: {self.init_image} {problem}")
        if "strength" in self.model_fields_set and self.init_image is None:
            raise ValueError("strength says how far to go away from a picture: give init_image too")
        if self.negative_prompts and self.negative_prompt:
            raise ValueError("negative_prompt and negative_prompts: give one of the two")
        if self.negative_prompts and len(self.negative_prompts) != len(self.all_prompts):
            raise ValueError(
                f"negative_prompts: {len(self.negative_prompts)} for {len(self.all_prompts)} prompts; give one for "
                "each, or negative_prompt for all"
            )
        if self.negatives_without_use:
            raise ValueError(f"guidance: {self.guidance} computes no guidance, so a negative prompt has no effect")
        if not self.version.sees_sizes and {"original_size", "crop"} & self.model_fields_set:
            raise ValueError(f"original_size, crop: only SDXL is told sizes, not {self.model_version}")
        return self

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1

    @property
    def negatives_without_use(self) -> bool:
        return not self.is_guided and bool(self.negative_prompt or any(self.negative_prompts))

    @property
    def default_aspect_ratio(self) -> float:
        height, width = size_of(self.init_image) if self.init_image else (1, 1)
        return width / height

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures: what `size` says, else multiples of 64 px with about the area of the square."""
        if self.size:
            return self.size
        side = self.image_size or IMAGE_SIZE[self.model_version]
        ratio = self.aspect_ratio or self.default_aspect_ratio
        grain = min(64, side)
        height, width = (max(round(one / grain), 1) * grain for one in (side / ratio**0.5, side * ratio**0.5))
        return height, width

    def negatives(self, count: int) -> list[str]:
        """The negative prompts of `count` pictures, which are each prompt with each seed."""
        if not self.negative_prompts:
            return [self.negative_prompt] * count
        return [negative for negative in self.negative_prompts for _ in self.seeds]


class StableDiffusionTextToImage:
    """Draws with a whole Stable Diffusion; see `families.common.text_to_image.TextToImage`."""

    Config = SdTextToImageConfig
    num_conditions = 0

    def __init__(self, config: SdTextToImageConfig):
        sampler, guidance = PUBLISHED[config.model_version]
        if config.diffusion_target == "rectified_flows":
            sampler = "euler"
        elif config.zero_terminal_snr:
            sampler = "ddim"
        self.config = config
        self.sampler = config.sampler or sampler
        guidance = guidance if config.guidance is None else config.guidance
        self.guidance = None if guidance == 1 else guidance
        self.diffusion, self.times = build.sampling_process(
            config,
            config.steps,
            self.sampler,
            shift=config.shift,
            spacing=config.timestep_spacing,
            karras=config.karras,
        )
        if config.init_image is not None:
            last_part(self.times, config.strength)  # where that leaves nothing, before weights are read
        self.networks = StableDiffusionNetworks(config, open_loras(config.lora, config, config.use_ema))
        scale_px = build.latents_of(config)[1]
        if any(side % scale_px for side in config.size_px):
            height, width = config.size_px
            raise UserError(
                f"size: {height} x {width} px (height x width); sides have to be multiples of {scale_px} px, such as "
                f"[{_nearest(height, scale_px)}, {_nearest(width, scale_px)}]"
            )
        self.latent_size = tuple(side // scale_px for side in config.size_px)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed."""
        config = self.config
        negatives = config.negatives(len(prompts))
        texts = list(dict.fromkeys([*prompts, *negatives]))
        read = self.networks.read(texts)
        sides = [
            {name: values[[texts.index(text) for text in side]] for name, values in read.items()}
            for side in (prompts, negatives)
        ]
        if config.version.sees_sizes:
            told = time_ids(config.original_size or config.size_px, config.crop, config.size_px)
            sides = [side | told for side in sides]
        start = None
        if config.init_image is not None:
            start = self.networks.encode(read_picture(config.init_image, config.size_px))
        latents = self.networks.draw(
            *sides, self.latent_size, seeds, diffusion=self.diffusion, times=self.times, steps=config.steps,
            sampler=self.sampler, guidance=self.guidance, guidance_rescale=config.guidance_rescale,
            shift=config.shift, start=start, noise_level=1.0 if start is None else config.strength,
        )  # fmt: skip
        return Drawn(self.networks.decode(latents, config.tiled_decoding))

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]


def _nearest(side: int, factor: int) -> int:
    return max(round(side / factor), 1) * factor
