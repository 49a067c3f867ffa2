"""Input scalers: the weights (a, b) of signal and noise in a noised sample a * x0 + b * epsilon, for given logSNR."""

import torch
from torch import Tensor

from warpcore.diffusion.schedules import Schedule


class Scaler:
    """Base of all scalers: calls `scale`, which a subclass defines, and stretches the result to the set limits."""

    def __init__(self):
        self.stretched_limits: list[float] | None = None

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of `logsnr`, all of one shape."""
        a, b = self.scale(logsnr)
        if self.stretched_limits is not None:
            min_a, max_a, min_b, max_b = self.stretched_limits
            a, b = (a - min_a) / (max_a - min_a), (b - min_b) / (max_b - min_b)
        return a, b

    def weights(self, logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of `logsnr` (B,), shaped (B, 1, ...) to be multiplied with `like` (B, ...)."""
        a, b = self(logsnr)
        shape = (-1, *[1] * (like.dim() - 1))
        return a.view(shape), b.view(shape)

    def scale(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of `logsnr`, all of one shape, before they are stretched."""
        raise NotImplementedError

    def setup_limits(
        self,
        schedule: Schedule,
        input_scaler: "Scaler",
        stretch_max: bool = True,
        stretch_min: bool = True,
        shift: float = 1.0,
    ) -> list[float]:
        """Stretch a and b linearly so that `schedule` reaches pure noise (`stretch_max`) and the clean signal
        (`stretch_min`): arXiv:2305.08891, algorithm 1. Returns [min a, max a, min b, max b] from before."""
        ends = schedule(torch.tensor([1.0, 0.0]), shift=shift)
        (min_a, max_a), (max_b, min_b) = (end.tolist() for end in input_scaler.scale(ends))
        self.stretched_limits = [
            min_a if stretch_max else 0,
            max_a if stretch_min else 1,
            min_b if stretch_min else 0,
            max_b if stretch_max else 1,
        ]
        return self.stretched_limits


class VPScaler(Scaler):
    """Variance preserving: a^2 + b^2 = 1."""

    def scale(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


class LERPScaler(Scaler):
    """Linear interpolation: a + b = 1."""

    def scale(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return (logsnr / 2).sigmoid(), (-logsnr / 2).sigmoid()


SCALERS = {"vp": VPScaler, "lerp": LERPScaler}
