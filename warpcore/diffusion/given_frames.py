"""Drawing clips of which frames are given: to continue a clip, or, from some noise on, to change one."""

import torch
from torch import Tensor

from warpcore.diffusion.sampler import Sampler


class GivenFrames(Sampler):
    """The steps of another sampler, taken by the frames of (B, C, T, ...) whose time has come; the others stay.

    A frame of share s joins at the first step whose time is s or below, noised to that time: 0 keeps it to the end, 1
    draws it from noise alone, and what is between changes it the more, the higher it is. The drawing begins with noise
    in frames of share 1, and with the given signal in others; a straight flow is assumed, whose time is the share of
    the noise.

    Args:
        sampler: one that looks at one step alone, such as DDIM; frames that join have no steps before.
        shares: (B, T) from 0 to 1.

    Attributes: `noised` (B, T) bool: the frames that take part in the step to come, for the network's `x_mask`.
    """

    def __init__(self, sampler: Sampler, shares: Tensor):
        super().__init__(sampler.scaler)
        self.sampler, self.shares = sampler, shares
        self.needs_variance = sampler.needs_variance
        self.noised = shares >= 1

    def start(self, logsnrs: Tensor) -> list[int]:
        order = self.sampler.start(logsnrs)
        if order != list(range(len(logsnrs))):
            raise ValueError(f"{type(self.sampler).__name__} asks twice about a step; frames cannot join it")
        self.noised = self.shares >= 1
        return order

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        """See `Sampler.step`; `noise` is called where a frame joins."""
        reached = self.sampler.step(x, x0, epsilon, logsnr, logsnr_next, noise=noise, variance=variance)
        reached = torch.where(_of_frames(self.noised, x), reached, x)
        time = (-logsnr_next / 2).sigmoid()[:, None]
        joins = (self.shares > 0) & (self.shares >= time) & ~self.noised
        self.noised = self.noised | joins
        if not joins.any():
            return reached
        a, b = self.scaler.weights(logsnr_next, x)
        return torch.where(_of_frames(joins, x), a * x + b * self._draw(noise), reached)


def _of_frames(mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, 1, ...)."""
    return mask.view(mask.shape[0], 1, mask.shape[1], *[1] * (like.dim() - 3))
