"""Drawing clips of which frames are given: to continue a clip, or, from some noise on, to change one."""

import torch
from torch import Tensor

from warpcore.diffusion.sampler import Sampler
from warpcore.transfer import to_device


class GivenFrames(Sampler):
    """The steps of another sampler, taken by the frames of (B, C, T, ...) whose time has come; the others stay.

    A frame of share s joins at the first step whose time is s or below, noised to that time: 0 keeps it to the end, 1
    draws it from noise alone, and what is between changes it the more, the higher it is. The drawing begins with noise
    in frames of share 1, and with the given signal in others. Times are those of a straight flow, which are the share
    of the noise, or with `by_steps` the share of the steps that are left, the joining one not counted.

    Args:
        sampler: one that looks at one step alone, such as DDIM; frames that join have no steps before.
        shares: (B, T) from 0 to 1, on the CPU: which frames join when is known before the first step.
        device: of the drawing.

    Attributes: `noised` (B, T) bool: the frames that take part in the step to come, for the network's `x_mask`.
    """

    def __init__(self, sampler: Sampler, shares: Tensor, device: torch.device | str = "cpu", by_steps: bool = False):
        super().__init__(sampler.scaler)
        self.sampler, self.shares, self.device = sampler, shares, torch.device(device)
        self.by_steps = by_steps
        self.needs_variance = sampler.needs_variance
        self.noised = to_device(shares >= 1, self.device)

    def start(self, logsnrs: Tensor) -> list[int]:
        order = self.sampler.start(logsnrs)
        if order != list(range(len(logsnrs))):
            raise ValueError(f"{type(self.sampler).__name__} asks twice about a step; frames cannot join it")
        left = torch.arange(len(logsnrs) - 3, -1, -1) / (len(logsnrs) - 1)  # after the second step, ...
        times = left if self.by_steps else (-logsnrs[1:-1] / 2).sigmoid()  # of the noise, where that begins, ...
        times = times[:, None, None]
        from_start = (self.shares >= 1)[None]
        noised = torch.cat([from_start, from_start | ((self.shares > 0) & (self.shares >= times))])
        joins = noised[1:] & ~noised[:-1]
        self.noised, *self._later = to_device(noised, self.device)
        self._joins = [which if some else None for which, some in zip(
            to_device(joins, self.device), joins.flatten(1).any(dim=1).tolist(), strict=True
        )]  # fmt: skip
        return order

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        """See `Sampler.step`; `noise` is called where a frame joins."""
        reached = self.sampler.step(x, x0, epsilon, logsnr, logsnr_next, noise=noise, variance=variance)
        reached = torch.where(of_frames(self.noised, x), reached, x)
        if not self._later:
            return reached
        self.noised, joins = self._later.pop(0), self._joins.pop(0)
        if joins is None:
            return reached
        a, b = self.scaler.weights(logsnr_next, x)
        return torch.where(of_frames(joins, x), a * x + b * self._draw(noise), reached)


def of_frames(mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) as the numbers of frames that (B, C, T, ...) have: (B, 1, T, 1, ...)."""
    return mask.view(mask.shape[0], 1, mask.shape[1], *[1] * (like.dim() - 3))
