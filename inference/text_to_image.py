"""Draw pictures for prompts: Stage C, Stage B, Stage A; or variations of a picture, or with a picture to start from;
with LoRAs, and under the control of ControlNets.

    python3 inference/text_to_image.py configs/inference/quickstart.yaml
    python3 inference/text_to_image.py --run runs/quickstart_c --image_size 128 --prompts "a red circle" --seeds 1
    python3 inference/text_to_image.py configs/inference/text_to_image_3b.yaml --image dog.jpg --noise_level 0.8
    python3 inference/text_to_image.py --run runs/quickstart_lora --image_size 128 --prompts "a green [heart]"
    python3 inference/text_to_image.py configs/inference/text_to_image_3b.yaml --lora dog.safetensors:0.8 \\
        --controlnet models/canny.safetensors --control_image house.jpg --prompts "a gingerbread house"

Without weights of Stage B, the previewer turns Stage C's latents into small, coarse pictures.
"""

import warpcore.openmp
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from families.cascade.controlled import pasted
from families.cascade.drawing import finish, sketch
from families.cascade.lora import open_loras
from families.cascade.pictures import read_picture, size_of, to_pictures
from families.cascade.sampling import Cascade
from families.cascade.steering import Steered, SteeringSettings, open_controls
from warpcore.config import ConfigError, Share, load_config
from warpcore.data.buckets import parse_ratio
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.errors import run_script
from warpcore.outputs import check_new, free_folder
from warpcore.pictures import grid, save_png
from warpcore.text import read_text


class TextToImageConfig(SteeringSettings):
    """Keys of this script, beside those of the networks."""

    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures, each of which holds its prompt and settings; by default the first
    of `pictures`, `pictures_2`, ... that is free."""
    overwrite: bool = False
    """Write over pictures of the same names in `output_path`."""
    prompts: list[str] = []
    """What to draw."""
    prompt_file: Path | None = None
    """A text file with a prompt per line, drawn after `prompts`."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    image: Path | None = None
    """A picture to vary: Stage C sees what it shows (CLIP). With `noise_level`, a picture to start from instead."""
    noise_level: Share | None = None
    """How much noise the latents of `image` get: little (0.2) keeps the picture, much (0.9) its rough layout."""
    seeds: list[int] = [0]
    """Each prompt is drawn once for each of these; a seed gives the same noise whatever else is drawn."""
    image_size: PositiveInt = 1024
    """Side of a square picture in pixels; other shapes get about the same area."""
    aspect_ratio: PositiveFloat | None = None
    """Width divided by height: 1.5, 3/2 or 16:9; by default that of `image` or `control_image`, else 1."""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] in pixels, instead of the two keys above."""
    steps: PositiveInt = 20
    """Sampling steps of Stage C."""
    guidance: float | None = 4.0
    """Classifier-free guidance: 1 follows the prompt as trained, more follows it harder; null computes none."""
    sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """`ddpm` is the published one; `dpmpp_2m` needs the fewest steps."""
    shift: PositiveFloat = 1.0
    """Moves the noise schedule towards more noise (> 1) for larger pictures."""
    preview: bool = False
    """Stop at the previewer's small pictures: fast, and without Stage B and Stage A."""

    @field_validator("aspect_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float | None:
        return None if value is None else parse_ratio(value)

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if not self.prompts and self.prompt_file is None and self.image is None:
            raise ValueError("nothing to draw: give prompts, prompt_file or image")
        if self.noise_level is not None and self.image is None:
            raise ValueError("noise_level says how far to go away from a picture: give image too")
        if self.noise_level == 0:
            raise ValueError("noise_level 0 would draw nothing: write a number above 0, up to 1")
        if self.image is not None and not self.image.is_file():
            raise ValueError(f"image: {self.image} does not exist")
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of Stage C: give run or generator_checkpoint_path")
        return self

    @property
    def all_prompts(self) -> list[str]:
        """Those of the config and of its file; a picture to vary needs none."""
        return [*self.prompts, *_lines(self.prompt_file)] or [""]

    @property
    def size_px(self) -> tuple[int, int]:
        if self.size:
            return self.size
        ratio = self.aspect_ratio
        if ratio is None:
            height, width = size_of(self.image) if self.image else self.control_shape or (1, 1)
            ratio = width / height
        side = self.image_size / ratio**0.5
        return round(side), round(side * ratio)

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `draw_latents` for Stage C."""
        names = ("steps", "guidance", "guidance_rescale", "sampler", "shift")
        return {name: getattr(self, name) for name in names}


def main() -> None:
    config = load_config(TextToImageConfig)
    complete = not config.preview and config.stage_b.generator_checkpoint_path is not None
    prompts, seeds = zip(*product(config.all_prompts, config.seeds), strict=True)
    folder = config.output_path or free_folder("pictures")
    files = [folder / name for name in file_names(prompts, seeds, len(config.controlnet))]
    if not config.overwrite:
        check_new(files, "give another output_path, or write overwrite=true")
    cascade = Cascade(config, open_loras(config.lora, config, config.use_ema))
    pictures, controls = draw(cascade, prompts, seeds, complete)
    save(config, files, prompts, seeds, pictures, controls)
    if not complete:
        why = "" if config.preview else ": there are no weights of Stage B (stage_b_checkpoint_path)"
        print(f"They are drawn by the previewer, which is coarser than the full cascade{why}.")
    print(cascade.peak_memory())


def draw(
    cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int], complete: bool
) -> tuple[list[Tensor], list[Steered]]:
    """A picture (3, H, W) in [0, 1] for each prompt and its seed, and what the ControlNets saw."""
    config = cascade.settings
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
    pictures = finish(cascade, drawn) if complete else cascade.preview(drawn.latents)
    for one in steered:
        if one.inpainted is not None and config.keep_unmasked:
            pictures = [pasted(picture, one.inpainted) for picture in pictures]
    return pictures, steered


def file_names(prompts: Sequence[str], seeds: Sequence[int], num_controls: int) -> list[str]:
    """Of a picture for each prompt and its seed, of what each ControlNet saw, and of the sheet with all of them."""
    pairs = enumerate(zip(prompts, seeds, strict=True))
    words = [re.sub(r"[^a-z0-9]+", "_", prompt.lower())[:60].strip("_") for prompt in prompts]
    names = [f"{number:04d}_{words[number]}_{seed}.png" for number, (_, seed) in pairs]
    return [*names, *(f"condition_{number}.png" for number in range(num_controls)), "grid.png"]


def save(
    config: TextToImageConfig,
    files: Sequence[Path],
    prompts: Sequence[str],
    seeds: Sequence[int],
    pictures: Sequence[Tensor],
    controls: Sequence[Steered],
) -> None:
    """Write each picture, with what it was made of inside, what the ControlNets saw, and a sheet of all pictures."""
    left_out = {"prompts", "prompt_file", "seeds", "output_path", "overwrite", "device", "batch_size"}
    settings = config.model_dump_json(exclude=left_out, exclude_defaults=True)
    sheet = [to_pictures(picture[None], config.size_px)[0] for picture in pictures]
    for file, picture, prompt, seed in zip(files, sheet, prompts, seeds, strict=False):
        save_png(file, picture, {"prompt": prompt, "seed": str(seed), "settings": settings})
    for file, control in zip(files[len(sheet) :], controls, strict=False):
        save_png(file, to_pictures(control.picture[None], config.size_px)[0])
    columns = len(config.seeds) if len(config.seeds) > 1 else min(6, len(sheet))
    together = grid(sheet, columns, prompts)
    save_png(files[-1], together, {"prompts": "\n".join(prompts), "settings": settings})
    print(f"{len(sheet)} pictures, and all of them together: {files[-1]}")


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise ConfigError(f"prompt_file: {path} does not exist")
    lines = [line.strip() for line in read_text(path).splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"prompt_file: {path} holds no prompt; write one per line")
    return prompts


if __name__ == "__main__":
    run_script(main)
