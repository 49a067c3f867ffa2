"""Drawing latents with the published noise levels: from noise, or in the few steps of a distilled network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from families.common.sampling import draw_latents
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.times import flow_sigma_times, karras_sigmas

MAX_SIGMA, MIN_SIGMA = 80.0, 0.002
"""The noise, relative to the signal, at which drawing begins, and at which the network is asked last."""
DISTILLED_SIGMAS = (MAX_SIGMA, 3.6, 1.5574, 0.684)
"""At which a distilled network is asked: as many of them as there are steps."""
MAX_SEED = 2**32 - 1
"""The largest seed of numpy's RandomState."""


def sigmas(steps: int) -> Tensor:
    """(steps + 1,) float64 noise levels; at the last one, the network is asked for the picture itself."""
    return karras_sigmas(steps, MAX_SIGMA, MIN_SIGMA)


def draw(
    diffusion: GDF,
    network: nn.Module,
    conditions: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int,
    distilled: bool = False,
    initial_noise: Tensor | None = None,
    **sampling: Any,
) -> Tensor:
    """Draw scaled latents (B, *shape).

    Args:
        steps: the network is asked once more than that, at the smallest noise; with `distilled` in 1 to 4 steps, with
            fresh noise before each.
        initial_noise, sampling: `sampler`, `guidance` and others, see `families.common.sampling.draw_latents`.
    """
    levels = DISTILLED_SIGMAS[:steps] if distilled else sigmas(steps)
    # Begun at clean latents of zeros: then the first sample has the noise of the largest sigma, a little less than 1.
    return draw_latents(
        diffusion, network, conditions, unconditional, shape, seeds, steps=steps, times=flow_sigma_times(levels),
        start=torch.zeros(len(seeds), *shape, device=next(iter(conditions.values())).device),
        initial_noise=initial_noise, guidance_rescale=0.0, **sampling,
    )  # fmt: skip


def published_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32: the noise that the published program draws for a seed, on any machine.

    seeds: 0 to `MAX_SEED`.
    """
    drawn = [np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))
