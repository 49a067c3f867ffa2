"""The diffusion process of the cascade, and the noise of Stage B."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from families.common.noise import coarse_noise
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS, for_target
from warpcore.diffusion.noise_conditions import CosineTNoiseCond, RectifiedFlowsNoiseCond
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


def pyramid_noise(random: SampleRandom, channels: int, size: tuple[int, int], size_range: tuple[int, int]) -> Tensor:
    """Noise (B, channels, H, W) whose coarse structures are as strong as its fine ones: what Stage B is trained with.

    To normal numbers of `size` (H, W), those of grids of half, a quarter, ... of the sides are added, as far as the
    grid's shorter side is in `size_range`.
    """
    levels = [level for level in range(1, 10) if size_range[0] <= min(size) // 2**level <= size_range[1]]
    noise = random.normal("noise", channels, *size)
    return blend_levels([(0, noise), *coarse_noise(random, channels, size, levels)])


def blend_levels(levels: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The sum of (level, noise (B, C, h, w)) enlarged to the size of the first, weighted by 0.75 to the level's power.

    Scaled to a deviation of 1 at each position.
    """
    size = levels[0][1].shape[2:]
    total = sum(0.75**level * F.interpolate(noise, size) for level, noise in levels)
    return total / math.sqrt(sum(0.75 ** (2 * level) for level, _ in levels))
