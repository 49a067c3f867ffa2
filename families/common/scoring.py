"""What a family gives `benchmarks/learning.py`, so that what its minis learned is scored by a program.

Pictures are uint8 (H, W, 3); clips, which some families draw in their place, uint8 (T, H, W, 3). What there are
several of (drawn whole or previewed, rebuilt by this network or that) is given by name, here called ways.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from families.common.inference import ComputeSettings, RunSettings
from families.common.pictures import to_pictures
from families.common.pipeline import LatentPipeline
from warpcore.errors import UserError
from warpcore.keys import Place

SIDE_PX = 128
"""Side of the pictures of the minis."""
Ways = dict[str, list[np.ndarray]]


class ScoredSettings(RunSettings, ComputeSettings):
    """The runs that are scored. A family adds what names its networks."""

    batch_size: PositiveInt = 50
    """Pictures that go through a network at once."""
    lora: list[Place] = []
    """LoRAs that the runs trained."""
    controlnet: list[str] = []
    """ControlNets that the runs trained."""


class Scored(Protocol):
    """The networks of trained minis: a class, made of its config."""

    Config: type[ScoredSettings]
    settings: ScoredSettings
    best: str
    """The way of `draw` that counts."""
    autoencoder: str
    """The way of `rebuild` through the autoencoder alone."""
    draws_classes: bool
    """Whether it is told names of classes ("red circle") in place of sentences."""
    draws_clips: bool
    """Whether it draws clips: of the moving demo set, whose classes are motions ("left")."""

    def __init__(self, settings: ScoredSettings, *, steps: int, guidance: float, sampler: str): ...

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        """A picture of `SIDE_PX` for each prompt, without LoRAs and ControlNets."""

    def with_lora(self) -> "Scored":
        """The same networks with the LoRAs of the settings."""

    def controlled(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seed: int) -> Ways:
        """Drawings from the same noise `without` and `with` the ControlNet of the settings, which sees `pictures`, and
        `with, guided`, where guidance leads towards them too."""

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        """What each way through the autoencoders makes of pictures."""

    def notes(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Further lines about what becomes of pictures."""


class ScoredLatents:
    """The ways through a denoiser of latents, without ControlNets; a family adds `draw` and what is named below."""

    best, autoencoder, draws_classes, draws_clips = "drawn", "autoencoder", False, False
    pipeline: type[LatentPipeline]
    open_loras: Callable[..., Sequence]
    """Reads the LoRAs of the settings: of their files, the settings, and `use_ema`."""
    scripts: str
    """What trains the runs that can be scored."""

    def __init__(self, settings: ScoredSettings, loras: Sequence = (), *, steps: int, guidance: float, sampler: str):
        self.settings = settings
        self.networks = self.pipeline(settings, loras)
        self.sampling = {"steps": steps, "guidance": guidance, "sampler": sampler}

    def with_lora(self) -> Self:
        settings = self.settings
        return type(self)(settings, self.open_loras(settings.lora, settings, settings.use_ema), **self.sampling)

    def controlled(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seed: int) -> Ways:
        raise UserError(f"this family has no ControlNets: score a run of {self.scripts}")

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        given = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
        with self.networks.holding("autoencoder", self.pipeline.build_autoencoder) as autoencoder:
            moments = [autoencoder.moments(picture[None]) for picture in given]
            made = [autoencoder.decode(autoencoder.scale.latents(one, None))[0] for one in moments]
        return {self.autoencoder: as_uint8(made)}

    def notes(self, pictures: Sequence[np.ndarray]) -> list[str]:
        return [self.networks.peak_memory()]


def class_numbers(names: Sequence[str], known: Sequence[str], example: str) -> list[int]:
    """The numbers of names of classes in the names that a run has.

    Raises:
        UserError: one of them is none of these, which the config `example` has.
    """
    if missing := [name for name in names if name not in known]:
        raise UserError(f"--run: it has no class {missing[0]!r} (class_names), as {example} names them")
    return [known.index(name) for name in names]


def as_uint8(pictures: Sequence[Tensor]) -> list[np.ndarray]:
    """Pictures (3, H, W) in [0, 1] as uint8 (H, W, 3)."""
    return [to_pictures(picture[None])[0] for picture in pictures]
