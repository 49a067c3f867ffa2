"""Samplers: one step from a noised sample to a less noisy one.

Every sampler is called as `sampler.step(x, x0, epsilon, logsnr, logsnr_next, previous=None, noise=None)`:
    x: (B, ...) the noised sample, with logSNR `logsnr` (B,).
    x0, epsilon: the signal and noise that the denoiser finds in it.
    logsnr_next: (B,) wanted logSNR of the result.
    previous: (x0, logsnr) of the step before, for multistep samplers; None in the first step.
    noise: gives standard normal draws like x; only called by a sampler that is random.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from warpcore.diffusion.diffusion import GDF

Noise = Callable[[], Tensor]


class Sampler:
    def __init__(self, gdf: "GDF"):
        self.gdf = gdf

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
    """DDIM (arXiv:2010.02502, eq. 12 and 16). `eta` 0 is deterministic and draws nothing; 1 is DDPM."""

    def __init__(self, gdf: "GDF", eta: float = 0.0):
        super().__init__(gdf)
        self.eta = eta

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a, b = self.gdf.input_scaler.weights(logsnr, x0)
        a_next, b_next = self.gdf.input_scaler.weights(logsnr_next, x0)
        if self.eta == 0:
            return a_next * x0 + b_next * epsilon
        # Equal noise levels, which clamped schedules have at their ends, must not become a root of -1e-8.
        sigma = self.eta * b_next / b * (1 - a**2 / a_next**2).clamp(min=0).sqrt()
        return a_next * x0 + (b_next**2 - sigma**2).clamp(min=0).sqrt() * epsilon + sigma * self._draw(noise)


class DDPMSampler(DDIMSampler):
    """Ancestral sampling (arXiv:2006.11239, algorithm 2): DDIM with eta 1."""

    def __init__(self, gdf: "GDF", eta: float = 1.0):
        super().__init__(gdf, eta)


class LCMSampler(Sampler):
    """Multistep consistency sampling (arXiv:2310.04378): the signal, noised afresh."""

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a_next, b_next = self.gdf.input_scaler.weights(logsnr_next, x0)
        return a_next * x0 + b_next * self._draw(noise)


class DPMSolverPP2MSampler(Sampler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): deterministic, multistep, second order in lambda = log(a / b).

    The first step, and one to or from a sample without noise or without signal, is of first order, which is DDIM.
    """

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, previous=None, noise=None):
        a, b = self.gdf.input_scaler.weights(logsnr, x)
        a_next, b_next = self.gdf.input_scaler.weights(logsnr_next, x)
        lam = (a / b).log()
        h = (a_next / b_next).log() - lam
        signal = x0
        if previous is not None:
            x0_before, logsnr_before = previous
            a_before, b_before = self.gdf.input_scaler.weights(logsnr_before, x)
            h_before = lam - (a_before / b_before).log()
            usable = h.isfinite() & (h_before > 0)
            slope = torch.where(usable, h / (2 * h_before), 0.0)
            signal = x0 + slope * (x0 - x0_before)
        return b_next / b * x - a_next * torch.expm1(-h) * signal


SAMPLERS = {"ddpm": DDPMSampler, "ddim": DDIMSampler, "lcm": LCMSampler, "dpmpp_2m": DPMSolverPP2MSampler}
