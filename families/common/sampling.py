"""Drawing latents from the noise of seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from modules.rank_by_noise import follow_noise
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.given_frames import GivenFrames, of_frames
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.noise_conditions import TimestepNoiseCond
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.times import TIME_RULES, Steps, last_part, sampling_times
from warpcore.random import SampleRandom
from warpcore.transfer import to_device


def sample_seeds(seed: int, count: int, most: int | None = None) -> list[int]:
    """The seeds of the sample pictures of a run with this `seed`: it, and the next ones. With these `seeds`, inference
    draws the same pictures from the weights that were exported at that update.

    most: the largest seed that inference takes, after which 0 comes.
    """
    return [seed + i if most is None else (seed + i) % (most + 1) for i in range(count)]


def latent_size(height: int, width: int, compression: float, patch_size: int = 1) -> tuple[int, int]:
    """(H, W) of the latents of a picture of `height` x `width` px, `compression` px per position; multiples of the
    patch size of the network that draws them."""
    return tuple(math.ceil(math.ceil(side / compression) / patch_size) * patch_size for side in (height, width))


def draw_latents(
    diffusion: GDF,
    network: nn.Module,
    conditions: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None,
    guidance_rescale: float = 0.7,
    guidance_channels: int | None = None,
    sampler: str = "ddpm",
    shift: float = 1.0,
    times: Tensor | None = None,
    start: Tensor | None = None,
    noise_level: float = 1.0,
    initial_noise: Tensor | None = None,
    given_frames: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Draw latents (B, *shape) from the noise that `seeds` stand for: the same seed, the same noise, in any batch.

    Args:
        guidance, guidance_rescale, guidance_channels: see `Guidance`.
        sampler: a name in `DIT_SAMPLERS`.
        times: of the steps; by default those that `sampler` is published with where timesteps are discrete
            (`warpcore.diffusion.times.sampling_times`), else equal ones.
        start: clean latents (B, *shape) at which drawing begins, with noise of `noise_level` (1 is hardly anything but
            noise); it makes that share of the steps.
        initial_noise: (B, *shape) normal numbers in place of those that the seeds stand for.
        given_frames: of clips, clean latents (B, *shape), and on the CPU the share of noise (B, T) from which each
            frame is drawn: 0 keeps it. The network is told by `x_mask` (B, T) which frames are noised. See
            `GivenFrames`.
    """
    given = (value for value in conditions.values() if isinstance(value, Tensor))
    device = next(chain(given, network.parameters())).device  # weights may be offloaded to another
    random = SampleRandom(seeds, device)
    x = random.normal("initial noise", *shape) if initial_noise is None else to_device(initial_noise, random.device)
    steps_by = DIT_SAMPLERS[sampler](diffusion.input_scaler)
    predict: Callable[..., Tensor] = network
    if given_frames is not None:
        latents, shares = given_frames
        steps_by = GivenFrames(steps_by, shares, x.device, isinstance(diffusion.schedule, TableSchedule))
        x = torch.where(of_frames(steps_by.noised, x), x, to_device(latents, x.device).to(x))
        predict = partial(_told_frames, network, steps_by)
    if times is None and isinstance(diffusion.schedule, TableSchedule):
        times = sampling_times(diffusion.schedule, steps, sampler)
    if times is not None:
        times = last_part(times, noise_level)
        diffusion = telling_times(diffusion, times, sampler)
    if start is not None:
        first = noise_level if times is None else times[0].item()
        t = torch.full((len(x),), first, device=device)
        x = diffusion.diffuse(start, x, t=t, shift=shift).noised
    with follow_noise(network, diffusion.noise_cond.level):
        for found, reached, _ in diffusion.sample(
            predict,
            conditions,
            x,
            unconditional=unconditional,
            sampler=steps_by,
            guidance=None if guidance is None else Guidance(guidance, guidance_rescale, channels=guidance_channels),
            steps=Steps(max(1, round(steps * noise_level)), start=noise_level, times=times, shift=shift),
            noise=lambda step: random.normal(f"noise of step {step}", *shape),
        ):
            # Published lists of times end where their pipelines end; what is found in given frames says nothing.
            drawn = found if times is None and given_frames is None else reached
    return drawn


def _told_frames(network: nn.Module, frames: GivenFrames, x: Tensor, r: Tensor, **conditions: Any) -> Tensor:
    """What the network predicts, told which frames of x (B or with guidance 2 B, C, T, ...) are noised."""
    return network(x, r, x_mask=frames.noised.repeat(len(x) // len(frames.noised), 1), **conditions)


def check_sampling(diffusion: GDF, steps: int, sampler: str) -> None:
    """Raises UserError where a sampler needs more than the network predicts, or has too few timesteps."""
    diffusion.check_sampler(DIT_SAMPLERS[sampler])
    if isinstance(diffusion.schedule, TableSchedule):
        sampling_times(diffusion.schedule, steps, sampler)


def telling_times(diffusion: GDF, times: Tensor, sampler: str) -> GDF:
    """The process whose network is told times between two timesteps, where a sampler's steps begin there.

    times: (N + 1,), as `sampling_times` gives them.
    """
    if not (times.is_floating_point() and TIME_RULES[sampler].fractional):
        return diffusion
    if not isinstance(diffusion.noise_cond, TimestepNoiseCond):
        return diffusion
    diffusion = copy(diffusion)
    diffusion.noise_cond = TimestepNoiseCond(diffusion.schedule, fractional=True)
    return diffusion
