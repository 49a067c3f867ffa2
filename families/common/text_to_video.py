"""Videos for prompts: the keys that every family takes, what it gives `inference/text_to_video.py`, and the files."""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import numpy as np
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch.distributed import ProcessGroup

from families.common.drawn_pictures import NOT_IN_PICTURES, file_names
from families.common.pictures import read_picture, to_pictures
from families.common.text_to_image import TextToImageConfig
from warpcore.clip_keys import FrameCount
from warpcore.clips import about_of, encode_mp4, strip
from warpcore.config_keys import SidePx
from warpcore.data.resolutions import named_length, named_size
from warpcore.data.video_headers import BadVideo, read_header
from warpcore.data.videos import decode
from warpcore.errors import UserError
from warpcore.files import read_bytes, write_whole
from warpcore.idle_keys import Need
from warpcore.pictures import grid, read_metadata, save_png, shrunk
from warpcore.processes import Processes
from warpcore.redaction import redact
from warpcore.safe_json import parse_json
from warpcore.text import counted

SHEET_SIDE_PX = 1024
"""The longest side of some frames of a video, side by side, in the sheet of all videos."""
LONGEST_DRAWING = timedelta(days=30)
"""A process that has nothing left to draw waits no longer than this for the others."""
SEVERAL_FRAMES = Need("clips of several frames", lambda config: config.clip_frames > 1)
Rate = Annotated[float, Field(gt=0, le=1000)]
"""Frames per second."""
Finished = Callable[[int, np.ndarray], None]
"""Takes the number of a video and its frames, uint8 (T, H, W, 3), as soon as it is drawn."""


class TextToVideoConfig(TextToImageConfig):
    """Which prompts are drawn, how large and how long, and where the videos are written."""

    needs = {
        "aspect_ratio": Need.of("resolution"), "fps": SEVERAL_FRAMES, "save_fps": SEVERAL_FRAMES,
        "skip_existing": Need.of("output_path"),
    }  # fmt: skip

    image_size: SidePx | tuple[SidePx, SidePx] | None = None
    """[height, width] of the frames in pixels, or the side of a square. By default that of the training."""
    resolution: str | None = None
    """The same by name, with `aspect_ratio`, as Open-Sora has it: `144p`, `240p`, `360p`, `480p`, `720p`, `1080p`,
    `2k`, `4k`, or squares and their like as `256`, `512`, `1024`."""
    aspect_ratio: str | None = None
    """Height : width, of those that the resolution has: `9:16` (the default) is wide, `16:9` is high. Squares and
    their like have other ratios, and are square by default."""
    num_frames: FrameCount | None = None
    """Frames of a clip, as a number, or as in Open-Sora `2s`, `4s`, `8s`, `16s`, `2s` being 51; 1 draws pictures. By
    default as many as in the training."""
    fps: Rate | None = None
    """Frames per second, which the network is told, and at which videos are written."""
    save_fps: Rate | None = None
    """Frames per second at which videos are written, where they are not those that the network is told."""
    sequence_shards: PositiveInt | None = None
    """With several processes (torchrun), how many draw each video together. By default as many as divide both them and
    the network's attention heads; groups share the prompts."""
    sample_name: Annotated[str, Field(pattern=r"^\w[\w.-]{0,49}$")] | None = None
    """Videos are called NAME_0000, NAME_0001, ..., of several seeds NAME_0000-0, NAME_0000-1, ...; by default after
    their prompts and seeds."""
    skip_existing: bool = False
    """Draw only the videos whose files are not in `output_path` yet: so the same command goes on with a drawing that
    was stopped. Files that say they were drawn with other settings stay as they are, and are told."""

    @field_validator("aspect_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> str | None:
        if type(value) is int and value >= 60:  # YAML 1.1 reads a bare 9:16 as a number in base 60
            return "{}:{}".format(*divmod(value, 60))
        return value if value is None else str(value)

    @field_validator("resolution", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("num_frames", mode="before")
    @classmethod
    def _length(cls, value: Any) -> Any:
        return named_length(value) if isinstance(value, str) and not value.isdecimal() else value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [key for key in ("image_size", "resolution", "size") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say the size of the frames; remove one")
        if self.resolution is not None:
            named_size(self.resolution, self.aspect_ratio)
        return self

    @model_validator(mode="after")
    def _kept_or_replaced(self) -> Self:
        if self.skip_existing and self.overwrite:
            raise ValueError("skip_existing keeps the videos that are there, and overwrite replaces them; remove one")
        return self

    @property
    def default_clip(self) -> tuple[int, int, int]:
        """(T, H, W) of clips where no key says it."""
        return 51, *named_size("240p", "9:16")

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        if self.resolution is not None:
            return named_size(self.resolution, self.aspect_ratio)
        if self.size is not None:
            return self.size
        if self.image_size is None:
            return self.default_clip[1:]
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def clip_frames(self) -> int:
        """T of the clips."""
        return self.num_frames or self.default_clip[0]

    @property
    def default_fps(self) -> float:
        """Frames per second where no key says it."""
        return 24.0

    @property
    def told_fps(self) -> float:
        """Frames per second that the network is told."""
        return self.fps or self.default_fps


class TextToVideo(Protocol):
    """What a family gives `inference/text_to_video.py`: a class, made of its config."""

    Config: type[TextToVideoConfig]
    titles: Sequence[str]
    """What each of the config's prompts is called: files are named after it."""
    total_frames: int
    """Of each video; 1 of pictures."""
    heads: int
    """Attention heads, which processes that draw a video together divide; 1 where there can be no several."""

    def __init__(self, config: TextToVideoConfig): ...

    def draw(
        self, prompts: Sequence[int], seeds: Sequence[int], finished: Finished, group: ProcessGroup | None = None
    ) -> None:
        """A video for each of some prompts, by their numbers, and its seed.

        group: the processes that draw each video together, all of which get the same.
        """

    def notes(self) -> list[str]:
        """Lines to print after the drawing: the memory that it took."""


def in_groups(processes: Processes, heads: int, wanted: int | None) -> Processes:
    """Processes that draw each video together in groups (collective): as large as they can be, or of a wanted size.

    Raises:
        UserError: groups of that size can't be.
    """
    if wanted and heads == 1 < wanted:
        raise UserError("sequence_shards: this network can't share the tokens of a video; remove the key")
    if wanted and heads % wanted:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise UserError(
            f"sequence_shards: {wanted} does not divide the {heads} heads of the network; write one of {fitting}"
        )
    return processes.in_groups(wanted or math.gcd(processes.count, heads))


def video_names(titles: Sequence[str], seeds: Sequence[int], config: TextToVideoConfig, ending: str) -> list[str]:
    """Of a video for each title and its seed, the seeds of a title one after another; and of the sheet."""
    if config.sample_name is None:
        *names, sheet = file_names(titles, seeds)
        return [*(name.removesuffix(".png") + ending for name in names), sheet]
    several = len(config.seeds)
    numbers = [divmod(number, several) for number in range(len(titles))]
    names = [f"{config.sample_name}_{title:04d}" + (f"-{seed}" if several > 1 else "") for title, seed in numbers]
    return [*(name + ending for name in names), "grid.png"]


class VideoFiles:
    """The files that videos become, each as soon as it is drawn: an mp4, or of a single frame a PNG; at last a sheet
    that shows some frames of all, and says what they were made of."""

    def __init__(self, config: TextToVideoConfig, files: Sequence[Path], titles: Sequence[str], seeds: Sequence[int]):
        self.config, self.files, self.titles, self.seeds = config, files, titles, seeds
        self.settings = config.model_dump_json(
            exclude={*NOT_IN_PICTURES, "prompts", "prompt_file", "skip_existing"}, exclude_defaults=True
        )
        self.shown: dict[int, np.ndarray] = {}

    def missing(self, frames: int) -> list[int]:
        """The numbers of the videos that are still to draw: with `skip_existing` those without a file. The others come
        into the sheet as they are.

        frames: of each video.

        Raises:
            UserError: a file that is there is damaged, or has another number of frames.
        """
        videos = self.files[: len(self.titles)]
        there = {n: file for n, file in enumerate(videos) if self.config.skip_existing and file.exists()}
        self.shown |= {number: _seen(file, frames) for number, file in there.items()}
        if there:
            print(f"{len(there)} of {len(videos)} are there already: {videos[0].parent}")
        others = {number: names for number, file in there.items() if (names := self._changed(number, file))}
        if others:
            number, names = next(iter(others.items()))
            print(
                f"{len(others)} of these were drawn with other settings, and stay as they are: {videos[number].name} "
                f"with another {', '.join(names)}; to draw all of them again, write overwrite=true in its place"
            )
        return [number for number in range(len(videos)) if number not in there]

    def _about(self, number: int) -> dict[str, str]:
        """What is written into the file of a video."""
        return {"prompt": self.titles[number], "seed": str(self.seeds[number]), "settings": self.settings}

    def _changed(self, number: int, file: Path) -> list[str]:
        """What a file says of itself that is otherwise now, as names of keys; none where it says nothing."""
        said, now = _said(file), _flat(self._about(number))
        changed = (key for key in said.keys() | now.keys() if _told(said, key) != _told(now, key))
        return sorted(changed) if said else []

    def save(self, number: int, video: np.ndarray) -> None:
        """See `Finished`."""
        file = self.files[number]
        file.parent.mkdir(parents=True, exist_ok=True)
        if len(video) > 1:
            rate, about = self.config.save_fps or self.config.told_fps, json.dumps(self._about(number))
            write_whole(file, encode_mp4(video, rate, about=about))
        else:
            save_png(file, video[0], self._about(number))
        self.shown[number] = _in_sheet(video)

    def finish(self, processes: Processes, group: ProcessGroup | None = None) -> None:
        """Write the sheet of what all processes have saved, and say where it is (collective).

        group: in which those that have nothing left to draw wait for the others; see `Processes.another_group`.
        """
        shown = processes.gather(self.shown, group)
        everyone = {number: video for of_one in shown for number, video in of_one.items()}
        if not processes.is_main:
            return
        shown = [everyone[number] for number in range(len(self.titles))]
        columns = min(len(self.config.seeds), 4) if len(self.config.seeds) > 1 else min(3, len(shown))
        about = {"prompts": "\n".join(self.titles), "settings": self.settings}
        save_png(self.files[-1], grid(shown, columns, self.titles), about)
        drawn = counted(len(shown), "picture" if self.files[0].suffix == ".png" else "video")
        print(f"{drawn}, and frames of all of them together: {self.files[-1]}")


def _in_sheet(video: np.ndarray) -> np.ndarray:
    return shrunk(strip(video), SHEET_SIDE_PX)


def _said(file: Path) -> dict[str, Any]:
    """What a file of `VideoFiles` says of how it was drawn; nothing where it is of something else."""
    try:
        return _flat(read_metadata(file) if file.suffix == ".png" else parse_json(about_of(read_bytes(file))))
    except (ValueError, KeyError, TypeError):
        return {}


def _flat(about: Mapping[str, str]) -> dict[str, Any]:
    return {key: about[key] for key in ("prompt", "seed")} | parse_json(about["settings"])


def _told(about: Mapping[str, Any], key: str) -> str:
    """A value as files hold it: without credentials."""
    return redact(json.dumps(about.get(key), ensure_ascii=False))


def _seen(file: Path, frames: int) -> np.ndarray:
    """What the sheet shows of the file of a video. Raises UserError where it is damaged or of other frames."""
    try:
        if frames == 1:
            return _in_sheet(to_pictures(read_picture(file)[None]))
        header = read_header(io.BytesIO(data := read_bytes(file)))
        if header.num_frames != frames:
            raise BadVideo(f"it has {header.num_frames} frames, and this drawing {frames}")
        return _in_sheet(decode(data, range(frames), (header.height, header.width)).pixels)
    except (BadVideo, UserError) as error:
        raise UserError(
            f"skip_existing: {file} is there already, but {error}; delete it, or give another output_path"
        ) from None
