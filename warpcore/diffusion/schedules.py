"""Noise schedules: the log signal-to-noise ratio of a time t, from 0 (clean) to 1 (noise).

logSNR = log(a^2 / b^2) of a sample a * x0 + b * epsilon. Every schedule is called as `schedule(t, shift=1)`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from warpcore.diffusion.buckets import mix_into_buckets

SMALLEST_DRAW = 2.0**-25
"""Half of the smallest uniform number above 0 that float32 draws give."""


UNSHIFTED_SIDE = 512
"""Pixels of the square pictures whose times `shift_by_size` leaves alone."""


class Schedule:
    """Base of all schedules: steps, shift and limits around `log_snr`, which a subclass defines.

    Args:
        shift: added as 2 * log(1 / shift) to logSNR: below 1 there is less noise at the same t, above 1 more (small
            pictures show their content through more noise than large ones: arXiv:2301.11093, eq. 4).
        force_limits: clamp logSNR to its values at t = 1 and t = 0, which contain the schedule's own shift but not
            that of a call.
        discrete_steps: round t to this many equally spaced values; an integer t is then the number of a step.
    """

    zero_terminal_snr: bool = False
    """Whether t = 1 is noise without any signal, so that the signal can't be told from the noise there."""

    def __init__(self, *, shift: float = 1.0, force_limits: bool = True, discrete_steps: int | None = None):
        self.shift = shift
        self.discrete_steps = discrete_steps
        self.limits: list[float] | None = None
        if force_limits:
            self.limits = self(torch.tensor([1.0, 0.0])).tolist()

    def __call__(self, t: Tensor, shift: float | Tensor = 1.0) -> Tensor:
        """logSNR of `t`, both (B,); `shift` may be of each sample (B,), on the device of `t`."""
        logsnr = self.log_snr(self.fraction(t).clamp(0, 1))
        if isinstance(shift, Tensor):
            logsnr = logsnr - 2 * (shift * self.shift).log()
        elif shift * self.shift != 1:
            logsnr = logsnr + 2 * math.log(1 / (shift * self.shift))
        return logsnr if self.limits is None else logsnr.clamp(*self.limits)

    def fraction(self, t: Tensor) -> Tensor:
        """`t` (B,) from 0 (clean) to 1 (noise), where it may be the number of a discrete step."""
        if self.discrete_steps is None:
            return t
        step = (t * (self.discrete_steps - 1)).round() if t.is_floating_point() else t
        return step / (self.discrete_steps - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        """Unshifted logSNR of t in [0, 1], both (B,)."""
        raise NotImplementedError

    def training_t(self, uniform: Tensor) -> Tensor:
        """The t of training samples from uniform draws in [0, 1), both (B,)."""
        return 1 - uniform

    def t_at(self, levels: Tensor) -> Tensor:
        """The t of noise levels from 0 (clean) to 1 (noise), both (B,): evenly spread, however training draws."""
        return levels


class _VarianceSchedule(Schedule):
    """A schedule given by the variance a^2 of the signal in a sample of variance 1.

    `clamp_range` keeps the variance away from 0 and 1, by clamping or, with `norm_instead`, by scaling 0..1 to it.
    """

    def __init__(
        self, s: float, clamp_range: Sequence[float] = (0.0001, 0.9999), norm_instead: bool = False, **kwargs
    ):
        self.s = s
        self.clamp_range = tuple(clamp_range)
        self.norm_instead = norm_instead
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        low, high = self.clamp_range
        variance = self.variance(t)
        variance = variance * (high - low) + low if self.norm_instead else variance.clamp(low, high)
        return variance.logit()

    def variance(self, t: Tensor) -> Tensor:
        raise NotImplementedError


def cosine_variance_at_zero(s: Tensor) -> Tensor:
    """f(0) of `CosineSchedule`, in the precision of `s`.

    Here, in the schedule and in its inverse, the order and precision of operations are those of the published
    implementation: the denoisers take sines of 10,000 times the inverse, which show its last float32 digit.
    """
    return (s / (1 + s) * math.pi * 0.5).cos() ** 2


class CosineSchedule(_VarianceSchedule):
    """Cosine schedule of Nichol & Dhariwal (arXiv:2102.09672, eq. 17): a^2 = f(t) / f(0),
    f(t) = cos((t + s) / (1 + s) * pi / 2)^2."""

    def __init__(
        self, s: float = 0.008, clamp_range: Sequence[float] = (0.0001, 0.9999), norm_instead: bool = False, **kwargs
    ):
        super().__init__(s, clamp_range, norm_instead, **kwargs)

    def variance(self, t: Tensor) -> Tensor:
        s = torch.tensor(self.s, dtype=t.dtype)
        return ((s + t) / (1 + s) * math.pi * 0.5).cos().clamp(0, 1) ** 2 / cosine_variance_at_zero(s)

    def training_t(self, uniform: Tensor) -> Tensor:
        # Published Stage C and B were trained with this small push towards noise.
        return (1 - uniform + 0.001).clamp(0.001, 1)


class CosineSchedule2(Schedule):
    """Cosine schedule of "simple diffusion" (arXiv:2301.11093, eq. 2): logSNR = -2 log tan(pi t / 2), with t scaled so
    that `logsnr_range` is what t from 1 to 0 covers."""

    def __init__(self, logsnr_range: Sequence[float] = (-15.0, 15.0), **kwargs):
        low, high = logsnr_range
        self.angle_at_zero = math.atan(math.exp(-0.5 * high))
        self.angle_at_one = math.atan(math.exp(-0.5 * low))
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.angle_at_zero + t * (self.angle_at_one - self.angle_at_zero)).tan().log()


class SqrtSchedule(_VarianceSchedule):
    """Square root schedule of Diffusion-LM (arXiv:2205.14217, appendix A): a^2 = 1 - sqrt(t + s)."""

    def __init__(
        self, s: float = 1e-4, clamp_range: Sequence[float] = (0.0001, 0.9999), norm_instead: bool = False, **kwargs
    ):
        super().__init__(s, clamp_range, norm_instead, **kwargs)

    def variance(self, t: Tensor) -> Tensor:
        return 1 - (t + self.s).sqrt()


class RectifiedFlowsSchedule(Schedule):
    """Straight path (1 - t) * x0 + t * epsilon (arXiv:2209.03003, eq. 1 with time reversed).

    Times of training are from `min_sigma` to 1 - `min_sigma`. With `logit_normal` log(t / (1 - t)) is normal of this
    mean and deviation (arXiv:2403.03206, eq. 19): there are more of medium noise.
    """

    def __init__(
        self,
        logsnr_range: Sequence[float] = (-15.0, 15.0),
        min_sigma: float = 0.0,
        logit_normal: bool = False,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        **kwargs,
    ):
        self.logsnr_range = tuple(logsnr_range)
        self.min_sigma = min_sigma
        self.logit_normal, self.logit_mean, self.logit_std = logit_normal, logit_mean, logit_std
        super().__init__(**kwargs)

    def training_t(self, uniform: Tensor) -> Tensor:
        if self.logit_normal:  # at a draw of 0 the quantile is infinite
            normal = torch.special.ndtri(uniform.clamp(min=SMALLEST_DRAW))
            t = (self.logit_mean + self.logit_std * normal).sigmoid()
        else:
            t = super().training_t(uniform)
        return t * (1 - 2 * self.min_sigma) + self.min_sigma if self.min_sigma else t

    def log_snr(self, t: Tensor) -> Tensor:
        return (2 * ((1 - t).log() - t.log())).clamp(*self.logsnr_range)


def shift_by_size(height: Tensor, width: Tensor, latent_frames: Tensor, scale: float = 1.0) -> Tensor:
    """The shift (B,) float32 of a straight flow by the size of clips, as Open-Sora 1.2 has it: sqrt(H W / 512^2 * T).

    Larger and longer clips show their content through more noise (arXiv:2403.03206, eq. 23).

    Args:
        height, width: (B,) in pixels.
        latent_frames: (B,) frames of the latents; 1 for pictures. Less than one counts as one.
        scale: of the shift.
    """
    area = height.float() * width.float() / UNSHIFTED_SIDE**2
    return (area * latent_frames.float().clamp(min=1)).sqrt() * scale


class EDMSampleSchedule(Schedule):
    """Sampling steps of Karras et al. (arXiv:2206.00364, eq. 5): sigma^(1/p) is linear in t."""

    def __init__(self, sigma_range: Sequence[float] = (0.002, 80.0), p: float = 7.0, **kwargs):
        self.sigma_range = tuple(sigma_range)
        self.p = p
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        low, high = (sigma ** (1 / self.p) for sigma in self.sigma_range)
        return -2 * self.p * (high + (1 - t) * (low - high)).log()


class LinearSchedule(Schedule):
    """logSNR linear in t."""

    def __init__(self, logsnr_range: Sequence[float] = (-10.0, 10.0), **kwargs):
        self.logsnr_range = tuple(logsnr_range)
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        low, high = self.logsnr_range
        return t * (low - high) + high


def stable_diffusion_variances(linear_range: Sequence[float], total_steps: int) -> Tensor:
    """(total_steps + 1,) variance a^2 of the signal after each step of Stable Diffusion: sqrt(beta) is linear."""
    low, high = (beta**0.5 for beta in linear_range)
    betas = torch.linspace(low, high, total_steps + 1, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


class StableDiffusionSchedule(Schedule):
    """Stable Diffusion's schedule, its variance interpolated between the discrete steps."""

    def __init__(self, linear_range: Sequence[float] = (0.00085, 0.012), total_steps: int = 1000, **kwargs):
        self.variances = stable_diffusion_variances(linear_range, total_steps)
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        variances = self.variances.to(t)
        position = t * (len(variances) - 1)
        before = position.floor().long().clamp(max=len(variances) - 2)
        return torch.lerp(variances[before], variances[before + 1], position - before).logit()


class InterpolatedSchedule(Schedule):
    """From the first schedule at t = 1 (noise) to the second at t = 0 (clean), each with its shift."""

    def __init__(self, schedule1: Schedule, schedule2: Schedule, shifts: Sequence[float] = (1.0, 1.0), **kwargs):
        self.schedule1, self.schedule2 = schedule1, schedule2
        self.shifts = tuple(shifts)
        super().__init__(**kwargs)

    def log_snr(self, t: Tensor) -> Tensor:
        t = t.clamp(1e-7, 1 - 1e-7)  # a schedule without limits may be infinite at an end, where its share is 0
        noisy, clean = self.schedule1(t, shift=self.shifts[0]), self.schedule2(t, shift=self.shifts[1])
        return noisy * t + clean * (1 - t)


class AdaptiveTrainSchedule(Schedule):
    """Trains more where the loss is higher: logSNR falls into a bucket with a probability proportional to its loss.

    t is turned into logSNR by the inverse of the distribution function, so that uniform t follow the distribution.

    State: `bucket_probs` (buckets,), the running loss of each bucket; see `update_buckets`.
    """

    def __init__(
        self,
        logsnr_range: Sequence[float] = (-10.0, 10.0),
        buckets: int = 100,
        min_probs: float = 0.0,
        shift: float = 1.0,
        beta: float = 0.99,
    ):
        edges = torch.linspace(*logsnr_range, buckets + 1)
        self.bucket_ranges = torch.stack([edges[:-1], edges[1:]], dim=1)
        self.bucket_probs = torch.ones(buckets)
        self.min_probs = min_probs
        self.beta = beta
        super().__init__(shift=shift, force_limits=False)

    def log_snr(self, t: Tensor) -> Tensor:
        self._to(t.device)
        weights = (self.bucket_probs + self.min_probs).double()
        upper = weights.cumsum(0) / weights.sum()
        quantile = 1 - t.double()
        bucket = torch.searchsorted(upper, quantile, right=True).clamp(max=len(upper) - 1)
        lower = upper[bucket] - weights[bucket] / weights.sum()
        share = ((quantile - lower) / (upper[bucket] - lower)).clamp(0, 1).to(t.dtype)
        low, high = self.bucket_ranges[bucket].to(t.dtype).unbind(1)
        return torch.lerp(low, high, share)

    @torch.no_grad()
    def update_buckets(self, logsnr: Tensor, loss: Tensor, beta: float | None = None) -> None:
        """Mix the losses (N,) of the samples of one update, in global order, into their buckets.

        A logSNR outside every bucket is booked on the first.
        """
        self._to(logsnr.device)
        low, high = self.bucket_ranges.unbind(1)
        inside = (low <= logsnr[:, None]) & (logsnr[:, None] < high)
        mix_into_buckets(self.bucket_probs, inside.long().argmax(1), loss, self.beta if beta is None else beta)

    def state_dict(self) -> dict[str, Tensor]:
        return {"bucket_probs": self.bucket_probs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bucket_probs.copy_(state["bucket_probs"])

    def _to(self, device: torch.device) -> None:
        self.bucket_ranges, self.bucket_probs = self.bucket_ranges.to(device), self.bucket_probs.to(device)


SCHEDULES = {
    "cosine": CosineSchedule,
    "cosine2": CosineSchedule2,
    "sqrt": SqrtSchedule,
    "rectified_flows": RectifiedFlowsSchedule,
    "edm_sample": EDMSampleSchedule,
    "linear": LinearSchedule,
    "stable_diffusion": StableDiffusionSchedule,
    "adaptive": AdaptiveTrainSchedule,
}
