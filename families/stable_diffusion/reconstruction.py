"""Pictures through an autoencoder of Stable Diffusion and back, for `inference/reconstruct.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from families.common.autoencoders import Autoencoder
from families.common.inference import read_run
from families.common.pictures import pad
from families.common.pipeline import Pipeline, sizes_of
from families.common.reconstruction import ReconstructConfig
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import with_local_weights
from families.stable_diffusion.build import autoencoder_by_itself, autoencoder_source
from families.stable_diffusion.config import SdSettings
from warpcore.keys import Weights


class AutoencoderReconstructConfig(ReconstructConfig):
    """Keys of `inference/reconstruct.py` for an autoencoder of Stable Diffusion."""

    autoencoder_checkpoint_path: Weights
    """Autoencoder: a folder of diffusers, a pipeline, a checkpoint in one file, or a file of its own; by default what
    the last `run` trained, or was trained with."""
    tiling: bool = False
    """Decode large pictures in overlapping tiles, which bounds the memory."""

    @model_validator(mode="before")
    @classmethod
    def _of_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        runs = values.get("run") or []
        runs = [runs] if isinstance(runs, str | Path) else runs
        if runs and not values.get(AUTOENCODER):
            values = values | {AUTOENCODER: autoencoder_of_run(Path(str(runs[-1])), values.get("use_ema", True))}
        return values


def autoencoder_of_run(folder: Path, use_ema: bool = True) -> Path:
    """The autoencoder that a training run trained, or had for its latents.

    Raises:
        ValueError: it is not a run's folder, holds no weights yet, or names no autoencoder.
    """
    saved, exported = read_run(folder, ("autoencoder", "generator", "lora"), use_ema)
    found = exported.get("autoencoder") or saved.get(AUTOENCODER)
    if found is None:  # beside the U-Net that it began with, or the one that comes with the project
        settings = SdSettings(**{key: saved[key] for key in SdSettings.model_fields if saved.get(key) is not None})
        found = autoencoder_source(with_local_weights(settings)).path
    return Path(found)


class AutoencoderReconstruction:
    """Rebuilds with an autoencoder, from the means of its latents; see
    `families.common.reconstruction.Reconstruction`."""

    Config = AutoencoderReconstructConfig

    def __init__(self, config: AutoencoderReconstructConfig):
        self.config = with_local_weights(config)
        self.pipeline = Pipeline(self.config)

    def rebuild(self, pictures: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        with self.pipeline.holding("autoencoder", self._load) as autoencoder:
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

    def _load(self, config: AutoencoderReconstructConfig) -> Autoencoder:
        precision = str(self.pipeline.dtype).removeprefix("torch.")
        return autoencoder_by_itself(
            config.autoencoder_checkpoint_path, any_scale=True, precision=precision, tiling=config.tiling
        )
