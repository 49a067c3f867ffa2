"""Whole diffusion processes, put together: of discrete timesteps, and of a straight flow."""

import math

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.learned_variance import LearnedRange
from warpcore.diffusion.loss_weights import loss_weight_for
from warpcore.diffusion.noise_conditions import FlowTimestepNoiseCond, TimestepNoiseCond
from warpcore.diffusion.scalers import LERPScaler, VPScaler
from warpcore.diffusion.schedules import RectifiedFlowsSchedule
from warpcore.diffusion.tables import make_table
from warpcore.diffusion.targets import TARGETS, RectifiedFlowsTarget, SignalwardsFlowTarget


def discrete_process(
    schedule: str = "scaled_linear",
    target: str = "epsilon",
    loss_weight: str = "constant",
    *,
    steps: int = 1000,
    zero_terminal_snr: bool = False,
    offset_noise: float = 0.0,
    fractional_timesteps: bool = False,
    learned_variance: bool = False,
    **weight_settings,
) -> GDF:
    """Discrete timesteps, as in Stable Diffusion (scaled_linear) and DiT (linear). The network is told the timestep.

    Args:
        schedule: a name in `BETAS`.
        target: a name in `TARGETS`.
        loss_weight, weight_settings: see `loss_weight_for`.
        fractional_timesteps: tell the network times between two timesteps, too, which samplers may ask for.
        learned_variance: the network predicts the variance of steps, too, as those of ADM and DiT do.

    Raises:
        UserError: a name is unknown, or the loss weight or the schedule makes no sense with the target.
    """
    weight = loss_weight_for(loss_weight, target, zero_terminal_snr=zero_terminal_snr, **weight_settings)
    table = make_table(schedule, steps, zero_terminal_snr=zero_terminal_snr)
    condition = TimestepNoiseCond(table, fractional=fractional_timesteps)
    variance = LearnedRange(table) if learned_variance else None
    return GDF(table, VPScaler(), TARGETS[target](), condition, weight, offset_noise, variance)


def flow_process(
    loss_weight: str = "constant",
    *,
    steps: float = 1000,
    shift: float = 1.0,
    min_sigma: float = 0.0,
    logit_normal: bool = False,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    signalwards: bool = False,
    offset_noise: float = 0.0,
    **weight_settings,
) -> GDF:
    """A straight path from the signal to the noise (flow matching). The network is told the noise's share of `steps`.

    Args:
        shift: above 1 there is more noise, for larger pictures (arXiv:2403.03206, eq. 23).
        min_sigma: of the noise's share in training, which ends at 1 - `min_sigma`.
        logit_normal: train more at medium noise (arXiv:2403.03206, eq. 19). logit_mean, logit_std: of log(t / (1 - t))
            for the noise's share t; a higher mean is more noise.
        signalwards: the network predicts the direction from the noise to the signal, not that from signal to noise.
        loss_weight, weight_settings: see `loss_weight_for`.
    """
    return GDF(
        RectifiedFlowsSchedule((-math.inf, math.inf), min_sigma, logit_normal, logit_mean, logit_std, shift=shift),
        LERPScaler(),
        SignalwardsFlowTarget() if signalwards else RectifiedFlowsTarget(),
        FlowTimestepNoiseCond(steps),
        loss_weight_for(loss_weight, "rectified_flows", **weight_settings),
        offset_noise,
    )
