"""Losses of an error that grow more slowly than its square, so that outliers count less."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoHuber:
    """2 c (sqrt(error^2 + c^2) - c): the square of small errors, 2 c times the size of large ones.

    With `smooth_l1` divided by c: square / c of small errors, twice the size of large ones. With the schedule `snr`, c
    is nearly 1 where there is little noise, and falls to the given one: c + (1 - c) / (1 + sigma)^2 with sigma^2 = 1 /
    SNR (arXiv:2403.16728, section 4, and kohya's sd-scripts).
    """

    c: float = 0.1
    schedule: str = "snr"
    smooth_l1: bool = False

    def __call__(self, error: Tensor, logsnr: Tensor) -> Tensor:
        """The loss of each element of an error (B, ...) at logSNR (B,)."""
        c = torch.full_like(logsnr, self.c)
        if self.schedule == "snr":
            c = c + (1 - c) / (1 + (-logsnr / 2).exp()).square()
        c = c.view(-1, *[1] * (error.dim() - 1))
        loss = 2 * ((error.square() + c.square()).sqrt() - c)
        return loss if self.smooth_l1 else c * loss
