"""Samplers by name: those that look at one step alone, and the table of all."""

import math

from warpcore.diffusion.learned_variance import Posterior
from warpcore.diffusion.multistep_samplers import (
    DPMSolverPP2MSampler,
    DPMSolverPP2MSDESampler,
    DPMSolverSampler,
    HeunSampler,
    PNDMSampler,
    RES2MSampler,
    UniPCSampler,
)
from warpcore.diffusion.sampler import Sampler
from warpcore.diffusion.scalers import Scaler


class DDIMSampler(Sampler):
    """DDIM (arXiv:2010.02502, eq. 12 and 16). `eta` 0 is deterministic and draws nothing; 1 is DDPM.

    With `eta` 0 it is also Euler's method in sigma = b / a (arXiv:2206.00364, algorithm 1 without churn), whatever the
    scaler; on a straight path, that of flow matching: x + (b_next - b) * (epsilon - x0).
    """

    def __init__(self, scaler: Scaler, eta: float = 0.0):
        super().__init__(scaler)
        self.eta = eta

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
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

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        a, b = self.scaler.weights(logsnr, x0)
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        kept = (b_next * a) / (a_next * b)  # sigma_next / sigma: the share of the noise that is not replaced
        fresh = (1 - kept**2).clamp(min=0).sqrt()
        return a_next * x0 + b_next * (kept * epsilon + fresh * self._draw(noise))


class LCMSampler(Sampler):
    """Multistep consistency sampling (arXiv:2310.04378): the signal, noised afresh."""

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        return a_next * x0 + b_next * self._draw(noise)


class IDDPMSampler(Sampler):
    """Ancestral sampling with a learned variance (arXiv:2102.09672): the published sampler of ADM and DiT."""

    needs_variance = True

    def start(self, logsnrs):
        self._posterior = Posterior.along(logsnrs.double().sigmoid().flip(0))
        self._left = len(logsnrs) - 1
        self._ends_clean = logsnrs[-1].item() == math.inf
        return super().start(logsnrs)

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        self._left -= 1
        posterior = self._posterior.at(self._left)
        mean = posterior.mean(x0, x)
        if self._left == 0 and self._ends_clean:
            return mean
        return mean + (0.5 * posterior.log_variance(variance)).exp() * self._draw(noise)


SAMPLERS = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "euler": DDIMSampler,
    "euler_ancestral": EulerAncestralSampler,
    "lcm": LCMSampler,
    "heun": HeunSampler,
    "pndm": PNDMSampler,
    "dpmpp_2m": DPMSolverPP2MSampler,
    "dpmpp_2m_sde": DPMSolverPP2MSDESampler,
    "unipc": UniPCSampler,
    "res_2m": RES2MSampler,
}
"""For any process."""
DIT_SAMPLERS = SAMPLERS | {"iddpm": IDDPMSampler, "dpm-solver": DPMSolverSampler}
"""With those as DiT and PixArt-alpha are published with; `iddpm` needs a network that learns variances."""
