"""The noise that training adds, where it is not simply independent normal numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from families.common.config import DiffusionConfig
from warpcore.random import SampleRandom


def training_draws(
    random: SampleRandom, shape: Sequence[int], config: DiffusionConfig
) -> Mapping[str, Tensor | float | None]:
    """What `GDF.diffuse` takes of a config for latents (B, *shape), beside the noise: levels, and what is added to it.

    At a level that is given, where runs are compared, nothing is added.
    """
    channels, *positions = shape
    if random.level is not None:
        offset = torch.zeros(len(random.seeds), channels, *[1] * len(positions), device=random.device)
        return {"level": random.level, "offset": offset if config.offset_noise else None}
    offset = random.normal("offset noise", channels, *[1] * len(positions)) if config.offset_noise else None
    gamma = config.input_perturbation
    perturbation = random.normal("input perturbation", *shape) * gamma if gamma else None
    return {"uniform": random.uniform("timestep"), "offset": offset, "perturbation": perturbation}


def training_noise(random: SampleRandom, shape: Sequence[int], config: DiffusionConfig) -> Tensor:
    """What a config noises latents (B, *shape) with, where `shape` is (C, *positions); at given levels white noise."""
    if not config.multires_noise_iterations or random.level is not None:
        return random.normal("noise", *shape)
    levels, discount = config.multires_noise_iterations, config.multires_noise_discount
    return multires_noise(random, shape[0], shape[1:], levels, discount)


def coarse_noise(
    random: SampleRandom, channels: int, size: Sequence[int], levels: Iterable[int]
) -> Iterator[tuple[int, Tensor]]:
    """(level, normal numbers (B, channels, *grid)): the grid of level n has the sides of `size` over 2^n, or 1."""
    for level in levels:
        yield level, random.normal(f"noise of level {level}", channels, *(max(side // 2**level, 1) for side in size))


def multires_noise(
    random: SampleRandom, channels: int, size: Sequence[int], iterations: int, discount: float
) -> Tensor:
    """Multi-resolution noise (B, channels, *size) (Whitaker, "Multi-Resolution Noise for Diffusion Model Training").

    The sum of normal numbers and, for each of `iterations` levels from 0, of the numbers of its grid, enlarged and
    times discount^level; divided by the deviation of the sample. Published code draws factors from 2 to 4 between the
    grids; here each has half the sides of the one before, down to 1.
    """
    levels = range(1, min(iterations, min(size).bit_length()))
    # Level 0 is a second draw like the first one: their sum is a normal number times the root of 2.
    total = random.normal("noise", channels, *size) * 2**0.5
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    for level, noise in coarse_noise(random, channels, size, levels):
        total = total + discount**level * F.interpolate(noise, tuple(size), mode=mode)
    return total / total.std(dim=tuple(range(1, total.dim())), keepdim=True)
