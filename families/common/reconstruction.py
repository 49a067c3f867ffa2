"""Pictures through an autoencoder and back: the keys that every family takes, and what it gives
`inference/reconstruct.py`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from families.common.autoencoders import Autoencoder
from families.common.inference import ComputeSettings, RunSettings, runs_of
from families.common.pictures import pad
from families.common.pipeline import Pipeline, sizes_of
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import with_local_weights
from warpcore.config_keys import SidePx
from warpcore.keys import Weights


class ReconstructConfig(RunSettings, ComputeSettings):
    """Which pictures are rebuilt, and where they are written."""

    pictures: list[Path]
    """Files, or folders of files, with their sub-folders."""
    most_pictures: PositiveInt = 64
    """At most this many of them, in the order of their names."""
    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures; by default the first of `reconstructions`, `reconstructions_2`,
    ... that is free."""
    overwrite: bool = False
    """Write over pictures of the same names in `output_path`."""
    image_size: SidePx | None = None
    """Scale pictures to the area of a square with this side, in pixels; without it, they keep their size."""


class Reconstruction(Protocol):
    """What a family gives `inference/reconstruct.py`: a class, made of its config."""

    Config: type[ReconstructConfig]

    def __init__(self, config: ReconstructConfig): ...

    def rebuild(self, pictures: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """What each way through the family's autoencoders makes of pictures (3, H, W) in [0, 1], by its name."""

    def notes(self) -> list[str]:
        """Lines to print at the end, such as the memory that it took."""


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

    def rebuild(self, pictures: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        config, precision = self.config, str(self.pipeline.dtype).removeprefix("torch.")
        load = partial(self.load, config.autoencoder_checkpoint_path, precision=precision, tiling=config.tiling)
        with self.pipeline.holding("autoencoder", lambda _: load()) as autoencoder:
            whole = [pad(picture, autoencoder.compression) for picture in pictures]

            def through(rows: list[int]) -> Tensor:
                pixels = (torch.stack([whole[row] for row in rows]) * 255).round().byte()
                return autoencoder.decode(autoencoder.scale.latents(autoencoder.moments(pixels), None))

            rebuilt = self.pipeline.in_batches("autoencoder", sizes_of(whole), through)
        sizes = sizes_of(pictures)
        return {
            "autoencoder": [made[:, :height, :width] for made, (height, width) in zip(rebuilt, sizes, strict=True)]
        }

    def notes(self) -> list[str]:
        return [self.pipeline.peak_memory()]
