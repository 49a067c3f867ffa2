"""Training targets: what the network predicts, and how signal and noise come back from a prediction.

A target is called as `target(x0, epsilon, logsnr, a, b)`; `x0` and `epsilon` take (noised, prediction, logsnr, a, b),
where noised = a * x0 + b * epsilon. Tensors are (B, ...), and a and b broadcast to them.
"""

from typing import Protocol

from torch import Tensor


class Target(Protocol):
    """`logsnr` is (B,), a and b are (B, 1, ...), all else is (B, ...)."""

    def __call__(self, x0: Tensor, epsilon: Tensor, logsnr: Tensor, a: Tensor, b: Tensor) -> Tensor: ...

    def x0(self, noised: Tensor, pred: Tensor, logsnr: Tensor, a: Tensor, b: Tensor) -> Tensor: ...

    def epsilon(self, noised: Tensor, pred: Tensor, logsnr: Tensor, a: Tensor, b: Tensor) -> Tensor: ...


class EpsilonTarget:
    """The noise (DDPM, arXiv:2006.11239, eq. 14)."""

    def __call__(self, x0, epsilon, logsnr, a, b):
        return epsilon

    def x0(self, noised, pred, logsnr, a, b):
        return (noised - b * pred) / a

    def epsilon(self, noised, pred, logsnr, a, b):
        return pred


class X0Target:
    """The clean signal."""

    def __call__(self, x0, epsilon, logsnr, a, b):
        return x0

    def x0(self, noised, pred, logsnr, a, b):
        return pred

    def epsilon(self, noised, pred, logsnr, a, b):
        return (noised - a * pred) / b


class VTarget:
    """The velocity a * epsilon - b * x0 (Salimans & Ho, arXiv:2202.00512, appendix D), for any a and b."""

    def __call__(self, x0, epsilon, logsnr, a, b):
        return a * epsilon - b * x0

    def x0(self, noised, pred, logsnr, a, b):
        return (a * noised - b * pred) / (a**2 + b**2)

    def epsilon(self, noised, pred, logsnr, a, b):
        return (b * noised + a * pred) / (a**2 + b**2)


class RectifiedFlowsTarget:
    """The direction epsilon - x0 of a straight path (arXiv:2209.03003, eq. 1 with time reversed), for any a and b."""

    def __call__(self, x0, epsilon, logsnr, a, b):
        return epsilon - x0

    def x0(self, noised, pred, logsnr, a, b):
        return (noised - b * pred) / (a + b)

    def epsilon(self, noised, pred, logsnr, a, b):
        return (noised + a * pred) / (a + b)


class SignalwardsFlowTarget(RectifiedFlowsTarget):
    """The opposite direction x0 - epsilon, which the networks of Open-Sora predict."""

    def __call__(self, x0, epsilon, logsnr, a, b):
        return x0 - epsilon

    def x0(self, noised, pred, logsnr, a, b):
        return super().x0(noised, -pred, logsnr, a, b)

    def epsilon(self, noised, pred, logsnr, a, b):
        return super().epsilon(noised, -pred, logsnr, a, b)


TARGETS = {"epsilon": EpsilonTarget, "x0": X0Target, "v": VTarget, "rectified_flows": RectifiedFlowsTarget}
