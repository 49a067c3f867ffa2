"""Loss weights: how much the loss of a sample counts, for given logSNR (B,). Called as `weight(logsnr, shift=1)`.

A formula that was published for the squared error of one target is converted to that of another, so that the same
wrong guess of the clean signal costs the same.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from warpcore.diffusion.buckets import mix_into_buckets
from warpcore.diffusion.targets import TARGETS
from warpcore.errors import UserError

ZERO_SNR_ERROR = (
    "zero terminal SNR: the last timestep is pure noise, from which a network that predicts noise (target epsilon) "
    "learns and tells nothing"
)


class LossWeight:
    """Base of all loss weights: shift and clamp around `weight`, which a subclass defines."""

    of: str | None = None
    """The target (`TARGETS`) whose squared error the formula was published for; None: any."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Those that `loss_weight_for` accepts: for others the weight would be constant, grow without bounds towards pure
    noise, or have no published form."""

    def __call__(self, logsnr: Tensor, shift: float = 1.0, clamp_range: Sequence[float] | None = None) -> Tensor:
        """Weights of `logsnr`, both (B,).

        `shift` adds 2 * log(shift) to logSNR, the opposite of a schedule's shift; `clamp_range` bounds the result.
        """
        if shift != 1:
            logsnr = logsnr + 2 * math.log(shift)
        weight = self.weight(logsnr)
        return weight.clamp(*(clamp_range or (-1e9, 1e9)))

    def weight(self, logsnr: Tensor) -> Tensor:
        """Of `logsnr` (B,), in its shape, before it is bounded."""
        raise NotImplementedError


class ConstantLossWeight(LossWeight):
    def __init__(self, v: float = 1.0):
        self.v = v

    def weight(self, logsnr: Tensor) -> Tensor:
        return torch.full_like(logsnr, self.v)


class SNRLossWeight(LossWeight):
    """SNR: turns the error of x0 into that of epsilon."""

    of = "x0"
    targets = ("x0", "v")

    def weight(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp()


class P2LossWeight(LossWeight):
    """P2 weighting (arXiv:2204.00227, eq. 8): (k + SNR^s)^-gamma, for the error of epsilon."""

    of = "epsilon"
    targets = ("epsilon", "x0", "v")

    def __init__(self, k: float = 1.0, gamma: float = 1.0, s: float = 1.0):
        self.k, self.gamma, self.s = k, gamma, s

    def weight(self, logsnr: Tensor) -> Tensor:
        return (self.k + (logsnr * self.s).exp()) ** -self.gamma


class SNRPlusOneLossWeight(LossWeight):
    """SNR + 1 (arXiv:2202.00512, section 4): turns the error of x0 into that of v.

    For a straight flow it is a^2 + b^2, the weight of Cosmos-Predict2 before 2025-08-29.
    """

    of = "x0"
    targets = ("x0", "rectified_flows")

    def weight(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp() + 1


class MinSNRLossWeight(LossWeight):
    """min(SNR, max_snr) (arXiv:2303.09556, section 3.4), for the error of x0."""

    of = "x0"

    def __init__(self, max_snr: float = 5.0):
        self.max_snr = max_snr

    def weight(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp().clamp(max=self.max_snr)


class MinSNRPlusOneLossWeight(LossWeight):
    """min(SNR + 1, max_snr), for the error of x0."""

    of = "x0"
    targets = ("x0", "v")

    def __init__(self, max_snr: float = 5.0):
        self.max_snr = max_snr

    def weight(self, logsnr: Tensor) -> Tensor:
        return (logsnr.exp() + 1).clamp(max=self.max_snr)


class TruncatedSNRLossWeight(LossWeight):
    """max(SNR, min_snr) (arXiv:2202.00512, section 4), for the error of x0."""

    of = "x0"
    targets = ("x0", "v")

    def __init__(self, min_snr: float = 1.0):
        self.min_snr = min_snr

    def weight(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp().clamp(min=self.min_snr)


class SechLossWeight(LossWeight):
    """1 / cosh(logSNR / div) (arXiv:2303.00848, table 1)."""

    def __init__(self, div: float = 2.0):
        self.div = div

    def weight(self, logsnr: Tensor) -> Tensor:
        return 1 / (logsnr / self.div).cosh()


class DebiasedLossWeight(LossWeight):
    """1 / sqrt(min(SNR, max_snr)) (arXiv:2310.08442), for the error of epsilon; many trainers take 1000 as max_snr."""

    of = "epsilon"
    targets = ("epsilon", "x0", "v")

    def __init__(self, max_snr: float = math.inf):
        self.max_snr = max_snr

    def weight(self, logsnr: Tensor) -> Tensor:
        if self.max_snr < math.inf:
            logsnr = logsnr.clamp(max=math.log(self.max_snr))
        return (-logsnr / 2).exp()


class SigmoidLossWeight(LossWeight):
    """sigmoid(s * logSNR)."""

    def __init__(self, s: float = 1.0):
        self.s = s

    def weight(self, logsnr: Tensor) -> Tensor:
        return (logsnr * self.s).sigmoid()


class ComposedLossWeight(LossWeight):
    """The product of the weights `mul` over the product of the weights `div`."""

    def __init__(
        self,
        div: LossWeight | Sequence[LossWeight] = (),
        mul: LossWeight | Sequence[LossWeight] = (),
    ):
        self.div = [div] if isinstance(div, LossWeight) else list(div)
        self.mul = [mul] if isinstance(mul, LossWeight) else list(mul)

    def weight(self, logsnr: Tensor) -> Tensor:
        result = torch.ones_like(logsnr)
        for part in self.mul:
            result = result * part.weight(logsnr)
        for part in self.div:
            result = result / part.weight(logsnr)
        return result


class ConvertedLossWeight(LossWeight):
    """A weight for the error of its own target, as a weight for the error of another one.

    The squared errors of one prediction, of x0, epsilon, v (in a variance-preserving process) and a straight flow's
    direction, are in the proportions 1 : SNR : SNR + 1 : (sqrt(SNR) + 1)^2; so min(SNR, 5) becomes min(SNR, 5) / SNR
    for epsilon and min(SNR, 5) / (SNR + 1) for v (arXiv:2303.09556, section 3.4).
    """

    _LOG_X0_ERROR = {
        "x0": torch.zeros_like,
        "epsilon": lambda logsnr: -logsnr,
        "v": lambda logsnr: F.logsigmoid(-logsnr),
        "rectified_flows": lambda logsnr: 2 * F.logsigmoid(-logsnr / 2),
    }
    """Logarithm of the squared error of x0 where that of the target is 1."""

    def __init__(self, loss_weight: LossWeight, target: str):
        self.loss_weight, self.of = loss_weight, target

    def __call__(self, logsnr: Tensor, shift: float = 1.0, clamp_range: Sequence[float] | None = None) -> Tensor:
        # A shift moves the formula, not the proportion of the errors.
        here, own = self._LOG_X0_ERROR[self.of](logsnr), self._LOG_X0_ERROR[self.loss_weight.of](logsnr)
        return self.loss_weight(logsnr, shift, clamp_range) * (here - own).exp()

    def weight(self, logsnr: Tensor) -> Tensor:
        return self(logsnr)


def for_target(loss_weight: LossWeight, target: str) -> LossWeight:
    """The weight, for the error of a target (a key of `TARGETS`)."""
    return loss_weight if loss_weight.of in (None, target) else ConvertedLossWeight(loss_weight, target)


class AdaptiveLossWeight(LossWeight):
    """1 / running loss of the bucket of logSNR: every noise level contributes about the same loss.

    State: `bucket_losses` (buckets,), the running loss of each bucket; see `update_buckets`.
    """

    def __init__(
        self,
        logsnr_range: Sequence[float] = (-10.0, 10.0),
        buckets: int = 300,
        weight_range: Sequence[float] = (1e-7, 1e7),
        beta: float = 0.99,
    ):
        # The first and last bucket are what lies outside the grid.
        self.bucket_ranges = torch.linspace(*logsnr_range, buckets - 1)
        self.bucket_losses = torch.ones(buckets)
        self.weight_range = tuple(weight_range)
        self.beta = beta

    def weight(self, logsnr: Tensor) -> Tensor:
        bucket = self._bucket(logsnr)
        return (1 / self.bucket_losses[bucket]).clamp(*self.weight_range)

    @torch.no_grad()
    def update_buckets(self, logsnr: Tensor, loss: Tensor, beta: float | None = None) -> None:
        """Mix the unweighted losses (N,) of the samples of one update, in global order, into their buckets."""
        bucket = self._bucket(logsnr)
        mix_into_buckets(self.bucket_losses, bucket, loss, self.beta if beta is None else beta)

    def state_dict(self) -> dict[str, Tensor]:
        return {"bucket_losses": self.bucket_losses}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bucket_losses.copy_(state["bucket_losses"])

    def _bucket(self, logsnr: Tensor) -> Tensor:
        """(N,) int64; takes the state to the device that asks, so that no later call waits for a copy."""
        self.bucket_ranges = self.bucket_ranges.to(logsnr.device)
        self.bucket_losses = self.bucket_losses.to(logsnr.device)
        return torch.searchsorted(self.bucket_ranges, logsnr.contiguous())


LOSS_WEIGHTS = {
    "constant": ConstantLossWeight,
    "snr": SNRLossWeight,
    "p2": P2LossWeight,
    "snr_plus_one": SNRPlusOneLossWeight,
    "min_snr": MinSNRLossWeight,
    "min_snr_plus_one": MinSNRPlusOneLossWeight,
    "truncated_snr": TruncatedSNRLossWeight,
    "sech": SechLossWeight,
    "debiased": DebiasedLossWeight,
    "sigmoid": SigmoidLossWeight,
    "adaptive": AdaptiveLossWeight,
}


def loss_weight_for(name: str, target: str, *, zero_terminal_snr: bool = False, **settings) -> LossWeight:
    """The weight of a name in `LOSS_WEIGHTS`, for the error of a target in `TARGETS`.

    settings: of the formula, such as max_snr=5.
    zero_terminal_snr: the last timestep is pure noise. The weights are finite there, too.

    Raises:
        UserError: an unknown name, or a pair that makes no sense; the message names those that do.
    """
    if target not in TARGETS:
        raise UserError(f"target: {target!r} is unknown; write one of {', '.join(TARGETS)}")
    if name not in LOSS_WEIGHTS:
        raise UserError(f"loss_weight: {name!r} is unknown; write one of {', '.join(LOSS_WEIGHTS)}")
    targets = LOSS_WEIGHTS[name].targets
    if zero_terminal_snr and target == "epsilon":
        raise UserError(
            f"{ZERO_SNR_ERROR}; write one of the targets {', '.join(one for one in targets if one != target)}"
        )
    if target not in targets:
        sensible = [other for other, kind in LOSS_WEIGHTS.items() if target in kind.targets]
        raise UserError(
            f"loss_weight: {name} makes no sense for the target {target}; write one of the loss weights "
            f"{', '.join(sensible)}, or one of the targets {', '.join(targets)}"
        )
    return for_target(LOSS_WEIGHTS[name](**settings), target)
