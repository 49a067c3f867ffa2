"""Pictures and clips through an autoencoder and back: the keys that every family takes, and what it gives
`inference/reconstruct.py`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from families.common.autoencoders import Autoencoder
from families.common.inference import ComputeSettings, RunSettings, runs_of
from families.common.pictures import pad
from families.common.pipeline import Pipeline
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import with_local_weights
from warpcore.clip_keys import FrameCount
from warpcore.config_keys import SidePx
from warpcore.data.picture_files import is_video
from warpcore.idle_keys import Need
from warpcore.keys import Weights


class ReconstructConfig(RunSettings, ComputeSettings):
    """Which pictures and videos are rebuilt, and where they are written."""

    needs = dict.fromkeys(
        ("num_frames", "frame_stride"),
        Need("videos", lambda config: any(place.is_dir() or is_video(place) for place in config.pictures)),
    )

    pictures: list[Path]
    """Pictures and videos: files, or folders of files, with their sub-folders."""
    num_frames: FrameCount = 17
    """Frames of a video that are rebuilt, from its first one on; of a shorter video all."""
    frame_stride: FrameCount = 1
    """One in this number of frames of a video is taken."""
    most_pictures: PositiveInt = 64
    """At most this many of them, in the order of their names."""
    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures and clips; by default the first of `reconstructions`,
    `reconstructions_2`, ... that is free."""
    overwrite: bool = False
    """Write over files of the same names in `output_path`."""
    image_size: SidePx | None = None
    """Scale pictures and frames to the area of a square with this side, in pixels; without it, sizes stay."""


class Reconstruction(Protocol):
    """What a family gives `inference/reconstruct.py`: a class, made of its config."""

    Config: type[ReconstructConfig]

    def __init__(self, config: ReconstructConfig): ...

    def rebuild(self, originals: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """What each way through the family's autoencoders makes of pictures (3, H, W) and clips (T, 3, H, W) in
        [0, 1], by its name."""

    def notes(self) -> list[str]:
        """Lines to print at the end, such as the memory that it took."""


Rebuild = Callable[[Sequence[Tensor]], dict[str, list[Tensor]]]


def frame_by_frame(rebuild: Rebuild, originals: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What `rebuild`, which takes pictures (3, H, W), makes of pictures and of the frames of clips (T, 3, H, W)."""
    made = rebuild([frame for one in originals for frame in (one if one.ndim == 4 else one[None])])
    found = {}
    for name, frames in made.items():
        left = iter(frames)
        found[name] = [torch.stack([next(left) for _ in one]) if one.ndim == 4 else next(left) for one in originals]
    return found


class AutoencoderReconstructConfig(ReconstructConfig):
    """Keys of `inference/reconstruct.py` for a family with one autoencoder."""

    autoencoder_checkpoint_path: Weights
    """Autoencoder: a folder of diffusers, a pipeline, a published file or folder, or a file of its own; by default
    what the last `run` trained, or was trained with."""
    tiling: bool = False
    """Decode large pictures in overlapping tiles, which bounds the memory."""

    @classmethod
    def autoencoder_of_run(cls, folder: Path, use_ema: bool) -> Path:
        """The autoencoder that a training run trained, or had for its latents.

        Raises:
            ValueError: it is not a run's folder, holds no weights yet, or names no autoencoder.
        """
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _of_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        _, folders = runs_of(values)
        if folders and not values.get(AUTOENCODER):
            values = values | {AUTOENCODER: cls.autoencoder_of_run(folders[-1], values.get("use_ema", True))}
        return values


class AutoencoderReconstruction:
    """Rebuilds with an autoencoder, from the means of its latents; see `Reconstruction`."""

    Config: type[AutoencoderReconstructConfig]

    def __init__(self, config: AutoencoderReconstructConfig):
        self.config = with_local_weights(config)
        self.pipeline = Pipeline(self.config)

    def load(self, path: Path, **options: Any) -> Autoencoder:
        """The autoencoder at a path; options: see `Autoencoder`."""
        raise NotImplementedError

    def rebuild(self, originals: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        config, precision = self.config, str(self.pipeline.dtype).removeprefix("torch.")
        load = partial(self.load, config.autoencoder_checkpoint_path, precision=precision, tiling=config.tiling)
        with self.pipeline.holding("autoencoder", lambda _: load()) as autoencoder:
            work = partial(self._rebuild_with, autoencoder)
            return frame_by_frame(work, originals) if autoencoder.time_compression is None else work(originals)

    def _rebuild_with(self, autoencoder: Autoencoder, originals: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        whole = [_whole_latents(one, autoencoder) for one in originals]

        def through(rows: list[int]) -> Tensor:
            pixels = (torch.stack([whole[row] for row in rows]) * 255).round().byte()
            return autoencoder.decode(autoencoder.scale.latents(autoencoder.moments(pixels), None))

        rebuilt = self.pipeline.in_batches("autoencoder", [one.shape for one in whole], through)
        own = [
            made[: len(one), ..., : one.shape[-2], : one.shape[-1]]  # channels of a picture, frames of a clip
            for made, one in zip(rebuilt, originals, strict=True)
        ]
        return {"autoencoder": own}

    def notes(self) -> list[str]:
        return [self.pipeline.peak_memory()]


def _whole_latents(original: Tensor, autoencoder: Autoencoder) -> Tensor:
    """A picture (3, H, W) or clip (T, 3, H, W) whose last rows, columns and frame are repeated until latents fit."""
    whole = pad(original, autoencoder.compression)
    if whole.ndim == 3:
        return whole
    missing = (1 - len(whole)) % autoencoder.time_compression
    return torch.cat([whole, whole[-1:].expand(missing, -1, -1, -1)])
