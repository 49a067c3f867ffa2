"""Samplers of higher order, which remember the steps before or ask the network twice about a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from warpcore.diffusion.sampler import Sampler


class HeunSampler(Sampler):
    """Heun's method in sigma = b / a (arXiv:2206.00364, algorithm 1 without churn): of second order.

    Each step but the last is taken twice, then with the mean of the noise found at its beginning and at its end.
    """

    _before: tuple[Tensor, Tensor, Tensor] | None = None
    """x0, epsilon and logSNR at the beginning of a step that is to be taken a second time."""

    def start(self, logsnrs):
        self._before = None
        steps = len(logsnrs) - 1
        return [0, *(time for time in range(1, steps) for _ in range(2)), steps]

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        if self._before is None:
            self._before = (x0, epsilon, logsnr)
            return self._along(x0, epsilon, epsilon, logsnr, logsnr_next)
        x0_before, epsilon_before, logsnr_before = self._before
        self._before = None
        return self._along(x0_before, epsilon_before, (epsilon_before + epsilon) / 2, logsnr_before, logsnr_next)

    def _along(self, x0: Tensor, epsilon: Tensor, slope: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
        """From a sample with x0 and epsilon along a straight line in sigma whose slope is `slope` instead of epsilon.

        Sigma is infinite in pure noise, from which there is no other slope than epsilon.
        """
        a, b = self.scaler.weights(logsnr, x0)
        a_next, b_next = self.scaler.weights(logsnr_next, x0)
        change = torch.where(a > 0, b_next - a_next * b / a, 0.0)
        return a_next * x0 + b_next * epsilon + change * (slope - epsilon)


class PNDMSampler(HeunSampler):
    """Pseudo linear multistep (arXiv:2202.09778, eq. 9 and 12), the published sampler of Stable Diffusion 1.5.

    Its first step is Heun's; later ones extrapolate from the noise found in up to four (Adams-Bashforth).
    """

    _WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    """The weights of the noise found last, before that, and so on, by how many are known."""

    _found: Sequence[Tensor] = ()
    """The noise found in the steps before, the last first."""

    def start(self, logsnrs):
        self._before, self._found = None, ()
        steps = len(logsnrs) - 1
        return [0, 1, *range(1, steps + 1)] if steps > 1 else [0, 1]

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        if self._before is not None:  # the first step, once more
            return super().step(x, x0, epsilon, logsnr, logsnr_next)
        self._found = [epsilon, *self._found][:4]
        if len(self._found) == 1:
            return super().step(x, x0, epsilon, logsnr, logsnr_next)
        weights = self._WEIGHTS[len(self._found)]
        slope = sum(weight * found for weight, found in zip(weights, self._found, strict=True))
        return self._along(x0, epsilon, slope, logsnr, logsnr_next)


class DPMSolverPP2MSampler(Sampler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): deterministic, multistep, second order in lambda = log(a / b).

    The first step, and one to or from a sample without noise or without signal, is of first order, which is DDIM.
    """

    _before: tuple[Tensor, Tensor] | None = None
    """x0 and lambda of the step before."""

    def start(self, logsnrs):
        self._before = None
        return super().start(logsnrs)

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        _, b = self.scaler.weights(logsnr, x)
        a_next, b_next = self.scaler.weights(logsnr_next, x)
        h, signal = self._signal(x0, logsnr, logsnr_next)
        return b_next / b * x - a_next * torch.expm1(-h) * signal

    def _signal(self, x0: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> tuple[Tensor, Tensor]:
        """The step in lambda, and the signal in the middle of it, which follows from x0 now and before."""
        lam, lam_next = self._lambda(logsnr, x0), self._lambda(logsnr_next, x0)
        h, signal = lam_next - lam, x0
        if self._before is not None:
            x0_before, lam_before = self._before
            h_before = lam - lam_before
            usable = h.isfinite() & (h_before > 0)
            slope = torch.where(usable, self._middle(h) / h_before, 0.0)
            signal = x0 + slope * (x0 - x0_before)
        self._before = (x0, lam)
        return h, signal

    def _middle(self, h: Tensor) -> Tensor:
        """Where in a step of `h` the signal is taken, as a change of lambda."""
        return h / 2

    def _lambda(self, logsnr: Tensor, like: Tensor) -> Tensor:
        a, b = self.scaler.weights(logsnr, like)
        return (a / b).log()


class DPMSolverSampler(DPMSolverPP2MSampler):
    """DPM-Solver++(2M) as its authors' program runs it, with which DiT and PixArt-alpha are published: the last step,
    too, is of first order. It goes with continuous times that end at the least noisy timestep, see `TIME_RULES`.
    """

    def start(self, logsnrs):
        self._left = len(logsnrs) - 1
        return super().start(logsnrs)

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        self._left -= 1
        if self._left == 0:
            self._before = None
        return super().step(x, x0, epsilon, logsnr, logsnr_next)


class RES2MSampler(DPMSolverPP2MSampler):
    """Exponential Adams-Bashforth of order 2 in lambda (Hochbruck and Ostermann, "Exponential integrators", Acta
    Numerica 2010, section 2.5): the published sampler of Cosmos-Predict2.

    Where DPM-Solver++(2M) takes the signal in the middle of a step, its change over the step is integrated exactly.
    """

    def _middle(self, h: Tensor) -> Tensor:
        gone = -torch.expm1(-h)  # 1 - sigma_next / sigma
        return torch.where(h > 0, (h - gone) / gone, 0.0)


class DPMSolverPP2MSDESampler(DPMSolverPP2MSampler):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, eq. 18 and appendix): the same with fresh noise in each step."""

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        _, b = self.scaler.weights(logsnr, x)
        a_next, b_next = self.scaler.weights(logsnr_next, x)
        h, signal = self._signal(x0, logsnr, logsnr_next)
        replaced = -torch.expm1(-2 * h)
        return b_next / b * (-h).exp() * x + a_next * replaced * signal + b_next * replaced.sqrt() * self._draw(noise)


class UniPCSampler(DPMSolverPP2MSampler):
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv:2302.04867, algorithm 5 and 6), which predicts the signal.

    Its predictor is DPM-Solver++(2M). What the network says of the predicted sample first corrects this sample: no
    further question to the network is needed for it.
    """

    _last: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None] | None = None
    """The corrected sample, x0 and logSNR of the step before, and what its predictor knew of the one before that."""

    def start(self, logsnrs):
        self._last = None
        return super().start(logsnrs)

    def step(self, x, x0, epsilon, logsnr, logsnr_next, *, noise=None, variance=None):
        if self._last is not None:
            x = self._corrected(x0, logsnr)
        earlier = self._before
        predicted = super().step(x, x0, epsilon, logsnr, logsnr_next)
        self._last = (x, x0, logsnr, earlier)
        return predicted

    def _corrected(self, x0_here: Tensor, logsnr: Tensor) -> Tensor:
        """The sample at `logsnr` once more, from the last one, with the signal that was found here."""
        x, x0, logsnr_last, earlier = self._last
        _, b_last = self.scaler.weights(logsnr_last, x)
        a, b = self.scaler.weights(logsnr, x)
        lam_last = self._lambda(logsnr_last, x)
        h = self._lambda(logsnr, x) - lam_last
        shrunk = torch.expm1(-h)
        change = 0.5 * (x0_here - x0)
        if earlier is not None:
            x0_earlier, lam_earlier = earlier
            h_before = lam_last - lam_earlier
            # R rho = b of the paper's eq. 7 for two steps, solved by hand
            first = -1 / h - 1 / shrunk
            second = -2 * first / h - 1 / shrunk
            of_earlier = (first - second) / (1 + h_before / h)
            bend = of_earlier * h / h_before * (x0 - x0_earlier) + (first - of_earlier) * (x0_here - x0)
            change = torch.where((h > 0) & (h_before > 0), bend, change)
        return b / b_last * x - a * shrunk * (x0 + change)
