"""Noise conditions: the number r that tells the denoiser how noisy its input is, for given logSNR (B,)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from warpcore.diffusion.schedules import cosine_variance_at_zero, stable_diffusion_variances
from warpcore.diffusion.tables import TableSchedule


class NoiseCond:
    """Base of all noise conditions: shift and clamp around `cond`, which a subclass defines.

    Args:
        shift: added as 2 * log(shift) to logSNR, the opposite of a schedule's shift.
        clamp_range: of the result; None for no clamping.
    """

    ends: tuple[float, float] | None = None
    """r of a clean signal and of noise, between which it is a position in a schedule; None where it is none."""

    def __init__(self, *, shift: float = 1.0, clamp_range: Sequence[float] | None = None):
        self.shift = shift
        self.clamp_range = clamp_range

    def __call__(self, logsnr: Tensor) -> Tensor:
        """r (B,) of `logsnr` (B,)."""
        if self.shift != 1:
            logsnr = logsnr + 2 * math.log(self.shift)
        cond = self.cond(logsnr)
        return cond if self.clamp_range is None else cond.clamp(*self.clamp_range)

    def cond(self, logsnr: Tensor) -> Tensor:
        """r (B,) of `logsnr` (B,), before it is bounded."""
        raise NotImplementedError

    def level(self, r: Tensor) -> Tensor:
        """How noisy r (B,) says samples are, in float: their position (B,) in the schedule as the network is told it,
        from 0 (clean) to 1 (noise), any shift included. Timestep t of N is at t / N."""
        if self.ends is None:
            raise ValueError(f"{type(self).__name__} is no position in a schedule")
        clean, noise = self.ends
        return ((r - clean) / (noise - clean)).clamp(0, 1)


class CosineTNoiseCond(NoiseCond):
    """The t at which `CosineSchedule` has this logSNR (inverse of arXiv:2102.09672, eq. 17).

    `clamp_range` bounds both the variance of the signal and the result.
    """

    ends = (0.0, 1.0)

    def __init__(self, s: float = 0.008, clamp_range: Sequence[float] = (0.0, 1.0), *, shift: float = 1.0):
        self.s = s
        super().__init__(shift=shift, clamp_range=clamp_range)

    def cond(self, logsnr: Tensor) -> Tensor:
        s = torch.tensor(self.s, dtype=logsnr.dtype)
        variance = logsnr.sigmoid().clamp(*self.clamp_range)
        return (variance * cosine_variance_at_zero(s)).sqrt().acos() / (math.pi * 0.5) * (1 + s) - s


class EDMNoiseCond(NoiseCond):
    """log(sigma) / 4 (arXiv:2206.00364, table 1)."""

    def cond(self, logsnr: Tensor) -> Tensor:
        return -logsnr / 8


class SigmoidNoiseCond(NoiseCond):
    """The variance of the noise in a sample of variance 1."""

    ends = (0.0, 1.0)

    def cond(self, logsnr: Tensor) -> Tensor:
        return (-logsnr).sigmoid()


class LogSNRNoiseCond(NoiseCond):
    """logSNR itself."""

    def cond(self, logsnr: Tensor) -> Tensor:
        return logsnr


class EDMSigmaNoiseCond(NoiseCond):
    """sigma, in the units of data with deviation `sigma_data`."""

    def __init__(self, sigma_data: float = 1.0, **kwargs):
        self.sigma_data = sigma_data
        super().__init__(**kwargs)

    def cond(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).exp() * self.sigma_data


class RectifiedFlowsNoiseCond(NoiseCond):
    """The weight of the clean signal on a straight path: 1 for clean, 0 for noise, the other way round than t."""

    ends = (1.0, 0.0)

    def cond(self, logsnr: Tensor) -> Tensor:
        return (logsnr / 2).sigmoid()


class FlowTimestepNoiseCond(NoiseCond):
    """The weight of the noise on a straight path, from 0 to `steps`: the time of Stable Diffusion 3 and its kin."""

    def __init__(self, steps: float = 1000, **kwargs):
        self.steps = steps
        self.ends = (0.0, steps)
        super().__init__(**kwargs)

    def cond(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).sigmoid() * self.steps


class TimestepNoiseCond(NoiseCond):
    """The timestep of a table nearest to this logSNR, int64; with `fractional`, a float between two timesteps."""

    def __init__(self, schedule: TableSchedule, fractional: bool = False, **kwargs):
        self.schedule = schedule
        self.fractional = fractional
        self.ends = (0.0, schedule.steps)
        super().__init__(**kwargs)

    def cond(self, logsnr: Tensor) -> Tensor:
        timestep = self.schedule.timestep(logsnr)
        return timestep if self.fractional else timestep.round().long()


class StableDiffusionNoiseCond(NoiseCond):
    """The t at which `StableDiffusionSchedule` has this logSNR."""

    ends = (0.0, 1.0)

    def __init__(self, linear_range: Sequence[float] = (0.00085, 0.012), total_steps: int = 1000, **kwargs):
        self.variances = stable_diffusion_variances(linear_range, total_steps)
        super().__init__(**kwargs)

    def cond(self, logsnr: Tensor) -> Tensor:
        rising = -self.variances.to(logsnr)  # as searchsorted wants
        wanted = -logsnr.sigmoid()
        before = (torch.searchsorted(rising, wanted) - 1).clamp(0, len(rising) - 2)
        # The published implementation divides by the interval before the right one; it changes r by less than 1e-5.
        interval = (before - 1).clamp(min=0)
        share = (wanted - rising[before]) / (rising[interval + 1] - rising[interval])
        return ((before + share) / (len(rising) - 1)).clamp(0, 1)


class DiscreteNoiseCond(NoiseCond):
    """Another noise condition as the whole number of one of `steps` steps, truncated, in a float tensor.

    At the end of the range it is the last step, `steps - 1`.
    """

    _ROUNDING = 1e-3
    """Of a step. A noise condition of k / steps can come out a rounding below it, and is step k all the same."""

    def __init__(
        self, noise_cond: NoiseCond, steps: int = 1000, continuous_range: Sequence[float] = (0.0, 1.0), **kwargs
    ):
        self.noise_cond = noise_cond
        self.steps = steps
        self.continuous_range = tuple(continuous_range)
        self.ends = (0.0, steps)
        super().__init__(**kwargs)

    def cond(self, logsnr: Tensor) -> Tensor:
        low, high = self.continuous_range
        step = (self.noise_cond(logsnr) - low) / (high - low) * self.steps
        return (step + self._ROUNDING).trunc().clamp(max=self.steps - 1)


NOISE_CONDITIONS = {
    "cosine_t": CosineTNoiseCond,
    "edm": EDMNoiseCond,
    "sigmoid": SigmoidNoiseCond,
    "logsnr": LogSNRNoiseCond,
    "edm_sigma": EDMSigmaNoiseCond,
    "rectified_flows": RectifiedFlowsNoiseCond,
    "flow_timestep": FlowTimestepNoiseCond,
    "stable_diffusion": StableDiffusionNoiseCond,
}
