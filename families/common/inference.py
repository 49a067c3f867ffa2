"""Keys that inference scripts of all families share."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from warpcore.config import Settings


class RunSettings(Settings):
    """Networks out of training runs."""

    run: list[Path] = []
    """Folder of a training run, or several: the weights that they trained and their model settings are used."""
    use_ema: bool = True
    """With `run`: take the averaged weights, where there are some."""


class ComputeSettings(Settings):
    """Where and how networks compute."""

    batch_size: PositiveInt = 8
    """Pictures that go through a network at once."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision; by default bfloat16 on CUDA, else float32."""
