"""Learned variances (Improved DDPM, arXiv:2102.09672), as ADM, DiT and PixArt-alpha are trained with.

The network predicts twice the channels of its target. The second half v says for each element where the log variance
of a denoising step lies between that of the posterior q(x_{t-1} | x_t, x_0), at v = -1, and log beta_t, at 1 (eq. 15).
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from warpcore.diffusion.tables import TableSchedule
from warpcore.errors import UserError
from warpcore.transfer import to_device

HALF_BIN = 1 / 255
"""Half the distance of two neighbouring values of a picture with 256 of them in [-1, 1]."""
_LEAST = 1e-12
"""Of a probability whose logarithm is taken."""


class Posterior(NamedTuple):
    """The posterior q(x_{t-1} | x_t, x_0) of steps (arXiv:2006.11239, eq. 6 and 7): float32, (N,) by step, or shaped
    like the samples to multiply."""

    betas: Tensor
    x0_weight: Tensor
    x_weight: Tensor
    clipped_log_variance: Tensor
    """At a step to the clean signal, which has no variance, that of the next noisier step."""

    @classmethod
    def along(cls, alphas_cumprod: Tensor) -> Self:
        """Of the N steps between N + 1 falling float64 values of `alphas_cumprod`: the least noisy step comes first.

        In float32 from the betas on, as published: where 1 - alphas_cumprod is 1e-4, its rounding is 3e-4 of it, and
        networks are trained with that.
        """
        betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).float()
        products = torch.cat([alphas_cumprod[:1].float(), 1 - betas]).cumprod(0)
        before, after = products[:-1], products[1:]
        variance = betas * (1 - before) / (1 - after)
        noisier = torch.cat([variance[1:], betas[-1:]])
        return cls(
            betas,
            x0_weight=betas * before.sqrt() / (1 - after),
            x_weight=(1 - before) * (1 - betas).sqrt() / (1 - after),
            clipped_log_variance=torch.where(variance > 0, variance, noisier).log(),
        )

    def at(self, steps: Tensor | int) -> Self:
        """Of one step, or of `steps` in their shape."""
        return type(self)(*(values[steps] for values in self))

    def to(self, device: torch.device) -> Self:
        return type(self)(*to_device(torch.stack(self), device))

    def mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """Of the sample one step less noisy than x, given what is clean, x0: all (B, ...)."""
        return self.x0_weight * x0 + self.x_weight * x

    def log_variance(self, v: Tensor) -> Tensor:
        """The log variance that a network means by `v` (B, ...), -1 to 1: in its shape."""
        share = (v + 1) / 2
        return share * self.betas.log() + (1 - share) * self.clipped_log_variance


class LearnedRange:
    """The variance of a diffusion process over discrete timesteps whose network learns it."""

    def __init__(self, schedule: TableSchedule):
        self.schedule = schedule
        table = schedule.alphas_cumprod
        self._posterior_on = {table.device: Posterior.along(torch.cat([table.new_ones(1), table]))}

    def split(self, prediction: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """The prediction (B, channels, ...) of the target, and v of the same shape.

        Raises:
            UserError: the network has not twice the channels.
        """
        if prediction.shape[1] != 2 * channels:
            raise UserError(
                f"the network predicts {prediction.shape[1]} channels of latents with {channels}, but one that learns "
                f"its variance has {2 * channels}: take weights with a learned variance, or train without it"
            )
        return prediction.chunk(2, dim=1)

    def bound(self, x0: Tensor, x: Tensor, found: Tensor, v: Tensor, logsnr: Tensor) -> Tensor:
        """The terms (B, C, ...) of the variational bound, in bits (arXiv:2006.11239, eq. 5): how far the step that the
        network takes from `x` is from the posterior's; at timestep 0, the negative log likelihood of `x0`.

        Args:
            x: (B, C, ...) noised samples of the clean `x0`, at logSNR `logsnr` (B,).
            found: the signal that the network finds in them. Detach what it follows from: the bound is to teach
                variances only (arXiv:2102.09672, section 3.1).
            v: what the network says of variances.
        """
        timestep = self.schedule.timestep(logsnr).round().long().view(-1, *[1] * (x.dim() - 1))
        posterior = self._posterior(x.device).at(timestep)
        mean, log_variance = posterior.mean(found, x), posterior.log_variance(v)
        too_much = posterior.clipped_log_variance - log_variance
        wrong = (posterior.mean(x0, x) - mean).square()
        divergence = 0.5 * (too_much.exp() - too_much - 1 + wrong * (-log_variance).exp())
        nats = torch.where(timestep == 0, -binned_log_likelihood(x0, mean, log_variance), divergence)
        return nats / math.log(2)

    def _posterior(self, device: torch.device) -> Posterior:
        """The table on a device, brought there once."""
        if device not in self._posterior_on:
            self._posterior_on[device] = next(iter(self._posterior_on.values())).to(device)
        return self._posterior_on[device]


def binned_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The log probability, in nats, that a normal draw falls into the bin of `x`, one of 256 values in [-1, 1]; the
    outer bins have no end (arXiv:2006.11239, eq. 13). All are (B, ...), or broadcast to that."""
    precision = (-0.5 * log_variance).exp()
    below_top = _normal_cdf(precision * (x - mean + HALF_BIN))
    below_bottom = _normal_cdf(precision * (x - mean - HALF_BIN))
    inside = torch.where(x > 0.999, 1 - below_bottom, below_top - below_bottom)
    return torch.where(x < -0.999, below_top, inside).clamp(min=_LEAST).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """As published, by tanh: differs by less than 2e-4 from the integral."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
