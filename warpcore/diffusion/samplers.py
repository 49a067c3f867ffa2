"""Samplers: one step from a noised sample to a less noisy one.

Every sampler is called as `sampler.step(x, x0, epsilon, logsnr, logsnr_next, previous=None, noise=None)`:
    x: (B, ...) the noised sample, with logSNR `logsnr` (B,).
    x0, epsilon: the signal and noise that the denoiser finds in it.
    logsnr_next: (B,) wanted logSNR of the result.
    previous: (x0, logsnr) of the step before, for multistep samplers; None in the first step.
    noise: gives standard normal draws like x; only called by a sampler that is random.
It is made with the input scaler of the diffusion process, which gives the weights (a, b) of signal and noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from warpcore.diffusion.scalers import Scaler

Noise = Callable[[], Tensor]


class Sampler:
    def __init__(self, scaler: Scaler):
        self.scaler = scaler

    def step(
        self,
        x: Tensor,
        x0: Tensor,
        epsilon: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        *,
        previous: tuple[Tensor, Tensor] | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def _draw(self, noise: Noise | None) -> Tensor:
        if noise is None:
            raise ValueError(f"{type(self).__name__} is random: pass `noise`, which gives its normal draws")
        return noise()


class DDIMSampler(Sampler):
    """DDIM (arXiv:2010.02502, eq. 12 and 16). `eta` 0 is deterministic and draws nothing; 1 is DDPM.

    With `eta` 0 it is also Euler's method in sigma = b / a (arXiv:2206.00364, algorithm 1 without churn), whatever the
    scaler; on a straight path, that of flow matching: x + (b_next - b) * (epsilon - x0).
    """

    def __init__(self, scaler: Scaler, eta: float = 0.0):
        super().__init__(scaler)
        self.eta = eta

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a, b = self.scaler.weights(logsnr, x0)
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        if self.eta == 0:
            return a_next * x0 + b_next * epsilon
        # Equal noise levels, which clamped schedules have at their ends, must not become a root of -1e-8.
        sigma = self.eta * b_next / b * (1 - a**2 / a_next**2).clamp(min=0).sqrt()
        return a_next * x0 + (b_next**2 - sigma**2).clamp(min=0).sqrt() * epsilon + sigma * self._draw(noise)


class DDPMSampler(DDIMSampler):
    """Ancestral sampling (arXiv:2006.11239, algorithm 2): DDIM with eta 1."""

    def __init__(self, scaler: Scaler, eta: float = 1.0):
        super().__init__(scaler, eta)


class EulerAncestralSampler(Sampler):
    """Euler's method to a lower sigma = b / a than wanted, then noise (k-diffusion's `sample_euler_ancestral`).

    In a variance-preserving process it is DDPM.
    """

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a, b = self.scaler.weights(logsnr, x0)
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        kept = (b_next * a) / (a_next * b)  # sigma_next / sigma: the share of the noise that is not replaced
        fresh = (1 - kept**2).clamp(min=0).sqrt()
        return a_next * x0 + b_next * (kept * epsilon + fresh * self._draw(noise))


class LCMSampler(Sampler):
    """Multistep consistency sampling (arXiv:2310.04378): the signal, noised afresh."""

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        return a_next * x0 + b_next * self._draw(noise)


class DPMSolverPP2MSampler(Sampler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): deterministic, multistep, second order in lambda = log(a / b).

    The first step, and one to or from a sample without noise or without signal, is of first order, which is DDIM.
    """

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a, b = self.scaler.weights(logsnr, x)
        a_next, b_next = self.scaler.weights(logsnr_next, x)
        lam = (a / b).log()
        h = (a_next / b_next).log() - lam
        signal = x0
        if previous is not None:
            x0_before, logsnr_before = previous
            a_before, b_before = self.scaler.weights(logsnr_before, x)
            h_before = lam - (a_before / b_before).log()
            usable = h.isfinite() & (h_before > 0)
            slope = torch.where(usable, h / (2 * h_before), 0.0)
            signal = x0 + slope * (x0 - x0_before)
        return b_next / b * x - a_next * torch.expm1(-h) * signal


SAMPLERS = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "euler": DDIMSampler,
    "euler_ancestral": EulerAncestralSampler,
    "lcm": LCMSampler,
    "dpmpp_2m": DPMSolverPP2MSampler,
}
