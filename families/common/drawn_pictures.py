"""Pictures that inference scripts draw: the keys that every kind of them takes, and the files that they become."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from families.common.inference import ComputeSettings, RunSettings
from families.common.pictures import to_pictures
from warpcore.config import ConfigError
from warpcore.config_keys import SidePx, Steps
from warpcore.data.buckets import parse_ratio
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.files import why_no_file
from warpcore.pictures import grid, save_png
from warpcore.text import read_text

MAX_PICTURES = 100_000
"""At once."""
NOT_IN_PICTURES = {"seeds", "output_path", "overwrite", "device", "batch_size"}
"""Keys that the settings inside of pictures leave out."""


class DrawingConfig(RunSettings, ComputeSettings):
    """How pictures are drawn, and where they are written."""

    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures, each of which holds what it was made of; by default the first of
    `pictures`, `pictures_2`, ... that is free."""
    overwrite: bool = False
    """Write over pictures of the same names in `output_path`."""
    seeds: list[int] = Field([0], min_length=1)
    """Each prompt or class is drawn once for each of these; a seed gives the same noise whatever else is drawn."""
    image_size: SidePx = 1024
    """Side of a square picture in pixels; other shapes get about the same area."""
    aspect_ratio: PositiveFloat | None = None
    """Width divided by height: 1.5, 3/2 or 16:9; by default that of a picture that is given, else 1."""
    size: tuple[SidePx, SidePx] | None = None
    """[height, width] in pixels, instead of the two keys above."""
    steps: Steps = 20
    """Sampling steps."""
    guidance: float | None = 4.0
    """Classifier-free guidance: 1 follows what is drawn for as trained, more follows it harder; null computes none."""
    sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """`ddim` draws without further noise; `dpmpp_2m` needs the fewest steps."""
    shift: PositiveFloat = 1.0
    """Moves the noise schedule towards more noise (> 1) for larger pictures."""

    @field_validator("aspect_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float | None:
        return None if value is None else parse_ratio(value, "aspect_ratio")

    @property
    def default_aspect_ratio(self) -> float:
        """Width divided by height where no key says it."""
        return 1.0

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        if self.size:
            return self.size
        ratio = self.aspect_ratio or self.default_aspect_ratio
        side = self.image_size / ratio**0.5
        return round(side), round(side * ratio)


def read_lines(path: Path, key: str, noun: str) -> list[str]:
    """The lines of a text file that a key names, a `noun` in each, without empty ones and those that begin with #.

    Raises:
        ConfigError: there is no such file, or nothing in it.
    """
    if problem := why_no_file(path):
        raise ConfigError(f"{key}: {path} {problem}")
    lines = [line.strip() for line in read_text(path).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{key}: {path} holds no {noun}; write one per line")
    return found


class Drawn(NamedTuple):
    """Pictures (3, H, W) in [0, 1], one for each prompt or class; and further ones, such as what a ControlNet saw."""

    pictures: list[Tensor]
    conditions: Sequence[Tensor] = ()


def file_names(titles: Sequence[str], seeds: Sequence[int], num_conditions: int = 0) -> list[str]:
    """Of a picture for each title and its seed, of each condition, and of the sheet with all pictures."""
    pairs = enumerate(zip(titles, seeds, strict=True))
    words = [re.sub(r"[^a-z0-9]+", "_", title.lower())[:60].strip("_") for title in titles]
    names = [f"{number:04d}_{words[number]}_{seed}.png" for number, (_, seed) in pairs]
    return [*names, *(f"condition_{number}.png" for number in range(num_conditions)), "grid.png"]


def save_drawn(
    config: DrawingConfig,
    files: Sequence[Path],
    what: str,
    titles: Sequence[str],
    seeds: Sequence[int],
    drawn: Drawn,
    left_out: Collection[str],
) -> None:
    """Write each picture, with what it was made of inside, each condition, and a sheet of all pictures.

    Args:
        files: see `file_names`.
        what: what a title is, such as `prompt`.
        left_out: keys that say what was drawn, beside `NOT_IN_PICTURES`.
    """
    settings = config.model_dump_json(exclude={*NOT_IN_PICTURES, *left_out}, exclude_defaults=True)
    sheet = [to_pictures(picture[None], config.size_px)[0] for picture in drawn.pictures]
    for file, picture, title, seed in zip(files, sheet, titles, seeds, strict=False):
        save_png(file, picture, {what: title, "seed": str(seed), "settings": settings})
    for file, condition in zip(files[len(sheet) :], drawn.conditions, strict=False):
        save_png(file, to_pictures(condition[None], config.size_px)[0])
    columns = len(config.seeds) if len(config.seeds) > 1 else min(6, len(sheet))
    together = grid(sheet, columns, titles)
    save_png(files[-1], together, {f"{what}s": "\n".join(titles), "settings": settings})
    print(f"{len(sheet)} pictures, and all of them together: {files[-1]}")
