"""Pictures through an autoencoder and back: the keys that every family takes, and what it gives
`inference/reconstruct.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import PositiveInt
from torch import Tensor

from families.common.inference import ComputeSettings, RunSettings
from warpcore.config_keys import SidePx


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
