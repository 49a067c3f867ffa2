"""The diffusion process of the cascade, and drawing from it."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS, for_target
from warpcore.diffusion.noise_conditions import CosineTNoiseCond, RectifiedFlowsNoiseCond
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.diffusion.scalers import LERPScaler, VPScaler
from warpcore.diffusion.schedules import CosineSchedule, RectifiedFlowsSchedule
from warpcore.diffusion.targets import TARGETS, RectifiedFlowsTarget
from warpcore.random import SampleRandom


def make_diffusion(
    target: str = "epsilon", loss_weight: str = "p2", offset_noise: float = 0.0, convert_weight: bool = True
) -> GDF:
    """The process that the published weights were trained with, unless another target or loss weight is named.

    convert_weight: a loss weight published for the error of another target is converted; without it, the formula is
    taken as it is, as early versions of this project did.
    """
    weight = LOSS_WEIGHTS[loss_weight]()
    weight = for_target(weight, target) if convert_weight else weight
    if target == "rectified_flows":  # its noise and signal mix linearly (arXiv:2209.03003)
        return GDF(
            schedule=RectifiedFlowsSchedule(),
            input_scaler=LERPScaler(),
            target=RectifiedFlowsTarget(),
            noise_cond=RectifiedFlowsNoiseCond(),
            loss_weight=weight,
            offset_noise=offset_noise,
        )
    return GDF(
        schedule=CosineSchedule(clamp_range=(0.0001, 0.9999)),
        input_scaler=VPScaler(),
        target=TARGETS[target](),
        noise_cond=CosineTNoiseCond(),
        loss_weight=weight,
        offset_noise=offset_noise,
    )


def latent_size(height: int, width: int, compression: float, patch_size: int = 1) -> tuple[int, int]:
    """(H, W) of the latents of a picture of `height` x `width` px, `compression` px per position; multiples of the
    patch size of the network that draws them."""
    return tuple(math.ceil(math.ceil(side / compression) / patch_size) * patch_size for side in (height, width))


def pyramid_noise(random: SampleRandom, channels: int, size: tuple[int, int], size_range: tuple[int, int]) -> Tensor:
    """Noise (B, channels, H, W) whose coarse structures are as strong as its fine ones: what Stage B is trained with.

    To normal numbers of `size` (H, W), those of grids of half, a quarter, ... of the sides are added, as far as the
    grid's shorter side is in `size_range`.
    """
    levels = [(0, random.normal("noise", channels, *size))]
    for level in range(1, 10):
        grid = [side // 2**level for side in size]
        if size_range[0] <= min(grid) <= size_range[1]:
            levels.append((level, random.normal(f"noise of level {level}", channels, *grid)))
    return blend_levels(levels)


def blend_levels(levels: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The sum of (level, noise (B, C, h, w)) enlarged to the size of the first, weighted by 0.75 to the level's power.

    Scaled to a deviation of 1 at each position.
    """
    size = levels[0][1].shape[2:]
    total = sum(0.75**level * F.interpolate(noise, size) for level, noise in levels)
    return total / math.sqrt(sum(0.75 ** (2 * level) for level, _ in levels))


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
    sampler: str = "ddpm",
    shift: float = 1.0,
    start: Tensor | None = None,
    noise_level: float = 1.0,
) -> Tensor:
    """Draw latents (B, *shape) from the noise that `seeds` stand for: the same seed, the same noise, in any batch.

    With `start`, clean latents (B, *shape), drawing begins at them with noise of `noise_level` (1 is hardly anything
    but noise), and makes that share of the steps.
    """
    given = (value for value in conditions.values() if isinstance(value, Tensor))
    device = next(chain(given, network.parameters())).device  # weights may be offloaded to another
    random = SampleRandom(seeds, device)
    x = random.normal("initial noise", *shape)
    if start is not None:
        t = torch.full((len(x),), noise_level, device=device)
        x = diffusion.diffuse(start, x, t=t, shift=shift).noised
    return diffusion.sample_x0(
        network,
        conditions,
        x,
        unconditional=unconditional,
        sampler=SAMPLERS[sampler](diffusion.input_scaler),
        timesteps=max(1, round(steps * noise_level)),
        t_start=noise_level,
        cfg=guidance,
        cfg_rho=guidance_rescale,
        shift=shift,
        noise=lambda step: random.normal(f"noise of step {step}", *shape),
    )
