"""The diffusion process of the cascade, and drawing from it."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.noise_conditions import CosineTNoiseCond, RectifiedFlowsNoiseCond
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.diffusion.scalers import LERPScaler, VPScaler
from warpcore.diffusion.schedules import CosineSchedule, RectifiedFlowsSchedule
from warpcore.diffusion.targets import TARGETS, RectifiedFlowsTarget
from warpcore.random import SampleRandom


def make_diffusion(target: str = "epsilon", loss_weight: str = "p2", offset_noise: float = 0.0) -> GDF:
    """The process that the published weights were trained with, unless another target or loss weight is named."""
    if target == "rectified_flows":  # its noise and signal mix linearly (arXiv:2209.03003)
        return GDF(
            schedule=RectifiedFlowsSchedule(),
            input_scaler=LERPScaler(),
            target=RectifiedFlowsTarget(),
            noise_cond=RectifiedFlowsNoiseCond(),
            loss_weight=LOSS_WEIGHTS[loss_weight](),
            offset_noise=offset_noise,
        )
    return GDF(
        schedule=CosineSchedule(clamp_range=(0.0001, 0.9999)),
        input_scaler=VPScaler(),
        target=TARGETS[target](),
        noise_cond=CosineTNoiseCond(),
        loss_weight=LOSS_WEIGHTS[loss_weight](),
        offset_noise=offset_noise,
    )


def stage_c_latent_size(height: int, width: int, compression: float, patch_size: int = 1) -> tuple[int, int]:
    """(H, W) of Stage C's latents for a picture of `height` x `width` pixels; multiples of its patch size."""
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
    sampler: str = "ddpm",
    shift: float = 1.0,
) -> Tensor:
    """Draw latents (B, *shape) from the noise that `seeds` stand for: the same seed, the same noise, in any batch."""
    device = next(network.parameters()).device
    random = SampleRandom(seeds, device)
    return diffusion.sample_x0(
        network,
        conditions,
        random.normal("initial noise", *shape),
        unconditional=unconditional,
        sampler=SAMPLERS[sampler](diffusion),
        timesteps=steps,
        cfg=guidance,
        cfg_rho=guidance_rescale,
        shift=shift,
        noise=lambda step: random.normal(f"noise of step {step}", *shape),
    )
