"""Pictures and clips that inference scripts draw: the keys that every kind takes, and the files that they become."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from families.common.inference import ComputeSettings, RunSettings
from families.common.pictures import to_pictures
from warpcore.clips import save_clip
from warpcore.config import ConfigError
from warpcore.config_keys import SidePx, Steps
from warpcore.data.buckets import parse_ratio
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.files import why_no_file
from warpcore.idle_keys import Need
from warpcore.pictures import grid, save_png
from warpcore.text import read_text

MAX_PICTURES = 100_000
"""At once."""
NOT_IN_PICTURES = {"seeds", "output_path", "overwrite", "device", "batch_size"}
"""Keys that the settings inside of pictures leave out."""


GUIDED = Need("a guidance other than 1", lambda config: config.is_guided)


class DrawingConfig(RunSettings, ComputeSettings):
    """How pictures are drawn, and where they are written."""

    needs = dict.fromkeys(("image_size", "aspect_ratio"), Need("size: null", lambda config: config.size is None))

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
    def is_guided(self) -> bool:
        """Whether guidance is computed."""
        return self.guidance not in (None, 1)

    @property
    def clip_fps(self) -> float | None:
        """Frames per second of the clips that are drawn; None of pictures."""
        return None

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
    """Pictures (3, H, W) or clips (T, 3, H, W) in [0, 1], one for each prompt or class; and further pictures, such as
    what a ControlNet saw."""

    pictures: list[Tensor]
    conditions: Sequence[Tensor] = ()


def file_names(titles: Sequence[str], seeds: Sequence[int], num_conditions: int = 0) -> list[str]:
    """Of a picture for each title and its seed, of each condition, and of the sheet with all pictures."""
    pairs = enumerate(zip(titles, seeds, strict=True))
    words = [re.sub(r"[^a-z0-9]+", "_", title.lower())[:60].strip("_") for title in titles]
    names = [f"{number:04d}_{words[number]}_{seed}.png" for number, (_, seed) in pairs]
    return [*names, *(f"condition_{number}.png" for number in range(num_conditions)), "grid.png"]


def written_files(files: Sequence[Path], config: DrawingConfig) -> list[Path]:
    """What `save_drawn` writes for `files`: of clips an mp4 and an animated WebP, of everything else a PNG."""
    if config.clip_fps is None:
        return list(files)
    return [*(file.with_suffix(ending) for file in files[:-1] for ending in (".mp4", ".webp")), files[-1]]


def save_drawn(
    config: DrawingConfig,
    files: Sequence[Path],
    what: str,
    titles: Sequence[str],
    seeds: Sequence[int],
    drawn: Drawn,
    left_out: Collection[str],
) -> None:
    """Write each picture, with what it was made of inside, each condition, and a sheet of all pictures; of clips, see
    `written_files`, the sheet shows some frames, and alone says what they were made of.

    Args:
        files: see `file_names`.
        what: what a title is, such as `prompt`.
        left_out: keys that say what was drawn, beside `NOT_IN_PICTURES`.
    """
    settings = config.model_dump_json(exclude={*NOT_IN_PICTURES, *left_out}, exclude_defaults=True)
    sheet = [_shown(picture, config.size_px) for picture in drawn.pictures]
    for file, picture, title, seed in zip(files, sheet, titles, seeds, strict=False):
        if picture.ndim == 4:
            save_clip(file, picture, config.clip_fps)
        else:
            save_png(file, picture, {what: title, "seed": str(seed), "settings": settings})
    for file, condition in zip(files[len(sheet) :], drawn.conditions, strict=False):
        save_png(file, to_pictures(condition[None], config.size_px)[0])
    columns = len(config.seeds) if len(config.seeds) > 1 else min(6, len(sheet))
    together = grid(sheet, columns, titles)
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    save_png(files[-1], together, {plural: "\n".join(titles), "settings": settings})
    noun = "picture" if config.clip_fps is None else "clip"
    print(f"1 {noun}: {files[-1]}" if len(sheet) == 1 else f"{len(sheet)} {noun}s, and all together: {files[-1]}")


def _shown(drawn: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A picture, uint8 (H, W, 3) of `size`, or a clip (T, H, W, 3); one of a single frame is a picture."""
    if drawn.dim() == 3:
        return to_pictures(drawn[None], size)[0]
    clip = to_pictures(drawn)
    return clip if len(clip) > 1 else clip[0]
