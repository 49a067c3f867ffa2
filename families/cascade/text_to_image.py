"""Pictures for prompts by a whole cascade: Stage C, Stage B, Stage A; or variations of a picture, or with a picture to
start from; with LoRAs, and under the control of ControlNets.

Without weights of Stage B, the previewer turns Stage C's latents into small, coarse pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from families.cascade.controlled import pasted
from families.cascade.drawing import finish, sketch
from families.cascade.inference import OF_STAGE_B
from families.cascade.lora import open_loras
from families.cascade.sampling import Cascade
from families.cascade.steering import SteeringSettings, open_controls
from families.common.pictures import read_picture, size_of
from families.common.text_to_image import Drawn, TextToImageConfig
from warpcore.config import Share
from warpcore.files import why_no_file
from warpcore.idle_keys import Need


class CascadeTextToImageConfig(TextToImageConfig, SteeringSettings):
    """Keys of `inference/text_to_image.py` for the cascade; `steps`, `guidance` and `sampler` are Stage C's."""

    needs = {
        **dict.fromkeys(OF_STAGE_B, Need("preview: false", lambda config: not config.preview)),
        **dict.fromkeys(
            ("clip_image_model_name", "clip_image_checkpoint_path"),
            Need("image, without noise_level", lambda config: config.image is not None and config.noise_level is None),
        ),
    }

    image: Path | None = None
    """A picture to vary: Stage C sees what it shows (CLIP). With `noise_level`, a picture to start from instead."""
    noise_level: Share | None = None
    """How much noise the latents of `image` get: little (0.2) keeps the picture, much (0.9) its rough layout."""
    preview: bool = False
    """Stop at the previewer's small pictures: fast, and without Stage B and Stage A."""

    prompt_keys = "prompts, prompt_file or image"

    @model_validator(mode="after")
    def _a_picture_to_start_from(self) -> Self:
        if self.noise_level is not None and self.image is None:
            raise ValueError("noise_level says how far to go away from a picture: give image too")
        if self.noise_level == 0:
            raise ValueError("noise_level 0 would draw nothing: write a number above 0, up to 1")
        if self.image is not None and (problem := why_no_file(self.image)):
            raise ValueError(f"image: {self.image} {problem}")
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of Stage C: give run or generator_checkpoint_path")
        return self

    @property
    def draws_without_prompt(self) -> bool:
        return self.image is not None

    @property
    def default_aspect_ratio(self) -> float:
        height, width = size_of(self.image) if self.image else self.control_shape or (1, 1)
        return width / height

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `draw_latents` for Stage C."""
        names = ("steps", "guidance", "guidance_rescale", "sampler", "shift")
        return {name: getattr(self, name) for name in names}


class CascadeTextToImage:
    """Draws with a whole cascade; see `families.common.text_to_image.TextToImage`."""

    Config = CascadeTextToImageConfig

    def __init__(self, config: CascadeTextToImageConfig):
        self.config = config
        self.complete = not config.preview and config.stage_b.generator_checkpoint_path is not None
        self.num_conditions = len(config.controlnet)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed, and what the ControlNets saw."""
        config = self.config
        self.cascade = cascade = Cascade(config, open_loras(config.lora, config, config.use_ema))
        steered = open_controls(cascade, config, config.size_px)
        drawn = sketch(
            cascade,
            prompts,
            seeds,
            config.size_px,
            negative_prompt=config.negative_prompt,
            image=None if config.image is None else read_picture(config.image, config.size_px),
            noise_level=config.noise_level,
            controls=[one.control for one in steered],
            control_guided=config.control_guided,
            **config.sampling,
        )
        pictures = finish(cascade, drawn) if self.complete else cascade.preview(drawn.latents)
        for one in steered:
            if one.inpainted is not None and config.keep_unmasked:
                pictures = [pasted(picture, one.inpainted) for picture in pictures]
        return Drawn(pictures, [one.picture for one in steered])

    def notes(self) -> list[str]:
        notes = [self.cascade.peak_memory()]
        if self.complete:
            return notes
        why = "" if self.config.preview else ": there are no weights of Stage B (stage_b_checkpoint_path)"
        return [f"They are drawn by the previewer, which is coarser than the full cascade{why}.", *notes]
