"""Diffusion out of exchangeable parts: noise a clean signal, the loss of finding it again, sampling."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from warpcore.diffusion.guidance import Conditions, Guidance, expand_conditions, pair_conditions
from warpcore.diffusion.learned_variance import LearnedRange
from warpcore.diffusion.loss_weights import ZERO_SNR_ERROR, LossWeight
from warpcore.diffusion.noise_conditions import NoiseCond
from warpcore.diffusion.sampler import Sampler
from warpcore.diffusion.samplers import DDIMSampler
from warpcore.diffusion.scalers import Scaler
from warpcore.diffusion.schedules import Schedule
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.targets import EpsilonTarget, Target
from warpcore.diffusion.times import Steps
from warpcore.errors import UserError
from warpcore.transfer import to_device


class Diffused(NamedTuple):
    """What a training step needs to know of its noised batch."""

    noised: Tensor  # (B, ...) input of the denoiser
    noise: Tensor  # (B, ...)
    target: Tensor  # (B, ...) what the denoiser should say
    logsnr: Tensor  # (B,)
    noise_cond: Tensor  # (B,) r of the denoiser
    loss_weight: Tensor  # (B,)
    x0: Tensor  # (B, ...) the clean signal


class DenoisingLoss(NamedTuple):
    """What a micro-batch costs, per sample."""

    loss: Tensor  # (B,) weighted, which is minimised
    raw: Tensor  # (B,) before weighting
    logsnr: Tensor  # (B,)


class GDF:
    """Generic diffusion framework: a schedule, a scaler, a target, a noise condition and a loss weight.

    Args:
        offset_noise: the deviation of noise that is constant over each channel, added to the noise of training.
        variance: where the network learns the variance of steps, in twice the channels of its target.

    Raises:
        UserError: the network is to predict noise, of a schedule that ends in nothing else.
    """

    def __init__(
        self,
        schedule: Schedule,
        input_scaler: Scaler,
        target: Target,
        noise_cond: NoiseCond,
        loss_weight: LossWeight,
        offset_noise: float = 0.0,
        variance: LearnedRange | None = None,
    ):
        if schedule.zero_terminal_snr and isinstance(target, EpsilonTarget):
            raise UserError(f"{ZERO_SNR_ERROR}; write another target, such as v")
        self.schedule = schedule
        self.input_scaler = input_scaler
        self.target = target
        self.noise_cond = noise_cond
        self.loss_weight = loss_weight
        self.offset_noise = offset_noise
        self.variance = variance
        self.error: Callable[[Tensor, Tensor], Tensor] | None = None
        """What is minimised of errors (B, ...) at logSNR (B,), for each element; without it, their squares."""

    def setup_limits(self, stretch_max: bool = True, stretch_min: bool = True, shift: float = 1.0) -> list[float]:
        """Stretch the input scaler to pure noise and clean signal at the ends of the schedule."""
        return self.input_scaler.setup_limits(self.schedule, self.input_scaler, stretch_max, stretch_min, shift)

    def diffuse(
        self,
        x0: Tensor,
        epsilon: Tensor,
        uniform: Tensor | None = None,
        *,
        t: Tensor | None = None,
        level: float | None = None,
        offset: Tensor | None = None,
        perturbation: Tensor | None = None,
        shift: float | Tensor = 1.0,
        loss_shift: float = 1.0,
    ) -> Diffused:
        """Noise a batch.

        Args:
            x0: (B, C, ...) clean signal.
            epsilon: (B, C, ...) standard normal draws.
            uniform: (B,) uniform draws in [0, 1), which the schedule turns into times; or give `t` or `level`.
            t: (B,) times from 0 (clean) to 1 (noise); whole numbers are timesteps of a discrete schedule.
            level: from 0 (clean) to 1 (noise), of the whole batch; of the schedule without any shift.
            offset: (B, C, 1, ...) standard normal draws; needed exactly when `offset_noise` is not 0.
            perturbation: like `epsilon`; noise that the input has, but the target has not (arXiv:2301.11706, eq. 8).
            shift: of the schedule; (B,) of each sample.
            loss_shift: of the loss weight.
        """
        if [uniform, t, level].count(None) != 2:
            raise ValueError("diffuse needs uniform draws, t or a level, and only one of them")
        if (offset is None) == (self.offset_noise != 0):
            raise ValueError(f"offset_noise is {self.offset_noise}: pass `offset` draws exactly when it is not 0")
        if offset is not None:
            epsilon = epsilon + self.offset_noise * offset
        if level is not None:
            t = self.schedule.t_at(torch.full((len(x0),), level, device=x0.device))
            shift = 1 / self.schedule.shift
        t = self.schedule.training_t(uniform) if t is None else t
        precision = t.dtype if t.is_floating_point() else torch.promote_types(x0.dtype, torch.float32)
        logsnr = self.schedule(t, shift=shift).to(x0.device, precision)
        a, b = self.input_scaler.weights(logsnr, x0)
        return Diffused(
            noised=a * x0 + b * (epsilon if perturbation is None else epsilon + perturbation),
            noise=epsilon,
            target=self.target(x0, epsilon, logsnr, a, b),
            logsnr=logsnr,
            noise_cond=self.noise_cond(logsnr),
            loss_weight=self.loss_weight(logsnr, shift=loss_shift),
            x0=x0,
        )

    def given(self, diffused: Diffused) -> Tensor:
        """What the network sees of parts that are given: the signal; of discrete timesteps, with the noise of the
        first one, at which it is told that they are."""
        if not isinstance(self.schedule, TableSchedule):
            return diffused.x0
        first = self.schedule(torch.zeros(1, dtype=torch.int64)).to(diffused.logsnr.dtype)
        a, b = self.input_scaler.weights(to_device(first, diffused.x0.device), diffused.x0)
        return a * diffused.x0 + b * diffused.noise

    def loss(self, diffused: Diffused, prediction: Tensor, mask: Tensor | None = None) -> DenoisingLoss:
        """The loss of each sample: the mean squared error of the target over all dimensions, times the loss weight.
        With `error`, its mean takes the place of the squares, which stay the raw loss.

        Where the variance is learned, the mean of its variational bound in bits is added, which no loss weight changes
        (arXiv:2102.09672, eq. 16; weighted as in arXiv:2204.00227).

        Args:
            prediction: (B, ...) what the network says of `diffused.noised` and `diffused.noise_cond`.
            mask: broadcasts to the target; how much each position counts, relative to the mean over its sample.

        Raises:
            UserError: the prediction has another number of channels than the target, or with learned variance than
                twice that.
        """
        found, variance = self._split(prediction.float(), diffused.target)
        wrong = found - diffused.target
        raw = _masked_mean(wrong.square(), mask)
        loss = raw if self.error is None else _masked_mean(self.error(wrong, diffused.logsnr), mask)
        loss = loss * diffused.loss_weight
        if variance is not None:
            x0, _ = self.undiffuse(diffused.noised, diffused.logsnr, found.detach())
            bound = self.variance.bound(diffused.x0, diffused.noised, x0, variance, diffused.logsnr)
            loss = loss + _masked_mean(bound, mask)
        return DenoisingLoss(loss, raw, diffused.logsnr)

    def _split(self, prediction: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network predicts (B, C, ...) of the target, which is like `like`, and of the variance."""
        if self.variance is not None:
            return self.variance.split(prediction, like.shape[1])
        if prediction.shape[1:2] != like.shape[1:2]:
            raise UserError(
                f"the network predicts {prediction.shape[1]} channels of latents with {like.shape[1]}; without "
                "a learned variance, both must be equal"
            )
        return prediction, None

    def undiffuse(self, x: Tensor, logsnr: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise (x0, epsilon) in a noised batch by the prediction of the denoiser; `logsnr` is (B,)."""
        a, b = self.input_scaler.weights(logsnr, x)
        return self.target.x0(x, pred, logsnr, a, b), self.target.epsilon(x, pred, logsnr, a, b)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        conditions: Conditions,
        x_init: Tensor,
        *,
        unconditional: Conditions | None = None,
        guidance: Guidance | None = None,
        sampler: Sampler | None = None,
        steps: Steps = Steps(),  # noqa: B008
        noise: Callable[[int], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x0, x, prediction) after each step: the signal found, the next less noisy sample, the (guided)
        prediction, each (B, ...).

        The last x0 is free of the noise that the last x still holds where a schedule ends above t = 0 or is clamped
        there. A sampler that asks twice about a step (`heun`, the first step of `pndm`) yields after each.

        Args:
            model: called as model(x, r, **conditions), r being the noise condition (B,).
            conditions: tensors, None, or lists of those, by name; a tensor holds B samples, or one for all.
            x_init: (B, ...) the sample at the first time: normal draws at 1, a noised picture below.
            unconditional: the same names, for guidance; zeros if not given.
            guidance: without it, forwards are of B samples instead of 2 B.
            sampler: DDIM if not given.
            steps: where they begin, and where the last one ends.
            noise: gives normal draws like `x_init` for the number of a step (from 0); random samplers need it.

        Raises:
            UserError: the network has another number of channels, or no learned variance where the sampler needs it.
        """
        sampler = sampler or DDIMSampler(self.input_scaler)
        self.check_sampler(sampler)
        predict = self._predictor(model, conditions, unconditional, guidance, len(x_init))
        x = x_init.to(torch.promote_types(x_init.dtype, torch.float32))
        logsnrs, fractions = steps.along(self.schedule, x.dtype)
        order = sampler.start(logsnrs)
        logsnrs = to_device(logsnrs[order].to(x.dtype), x.device)[:, None].expand(-1, len(x))
        for step in range(len(order) - 1):
            logsnr, logsnr_next = logsnrs[step], logsnrs[step + 1]
            pred, variance = predict(x, logsnr, fractions[order[step]])
            x0, epsilon = self.undiffuse(x, logsnr, pred)
            draw = None if noise is None else partial(noise, step)
            x = sampler.step(x, x0, epsilon, logsnr, logsnr_next, noise=draw, variance=variance)
            yield x0, x, pred

    def _predictor(
        self,
        model: Callable[..., Tensor],
        conditions: Conditions,
        unconditional: Conditions | None,
        guidance: Guidance | None,
        batch_size: int,
    ) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor | None]]:
        """Gives the (guided) prediction of the target and that of the variance, of x (B, ...) at logSNR (B,) and time
        t."""
        pairs = None if guidance is None else pair_conditions(conditions, unconditional, batch_size)
        conditions = expand_conditions(conditions, batch_size)

        def predict(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
            r = self.noise_cond(logsnr)
            scale = guidance and guidance.scale_at(t)
            if scale is None:
                return self._split(model(x, r, **conditions).to(x.dtype), x)
            both, variance = self._split(model(torch.cat([x, x]), torch.cat([r, r]), **pairs).to(x.dtype), x)
            pred = guidance.combine(*both.chunk(2), scale)
            return pred, None if variance is None else variance[:batch_size]

        return predict

    def check_sampler(self, sampler: Sampler | type[Sampler]) -> None:
        """Raises UserError where the sampler needs a learned variance, and the network has none."""
        if sampler.needs_variance and self.variance is None:
            raise UserError(
                "sampler: iddpm needs a network that learns the variance of steps, which this one does not; write "
                "another one, such as ddpm"
            )

    def update_buckets(self, logsnr: Tensor, loss: Tensor) -> None:
        """Tell adaptive parts the unweighted losses (N,) at `logsnr` (N,) of all samples of one update, in global
        order. Does nothing without adaptive parts."""
        for part in self._adaptive_parts().values():
            part.update_buckets(logsnr, loss)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of adaptive parts; empty without."""
        parts = self._adaptive_parts().items()
        return {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state in place. Other names than those of `state_dict` are a ValueError."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the saved diffusion state holds {sorted(state)}, this run's holds {sorted(self.state_dict())}: "
                "another adaptive loss weight or schedule than that of the checkpoint"
            )
        for name, part in self._adaptive_parts().items():
            prefix = name + "."
            part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _adaptive_parts(self) -> dict:
        parts = {"schedule": self.schedule, "loss_weight": self.loss_weight}
        return {name: part for name, part in parts.items() if hasattr(part, "update_buckets")}


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B,) of each sample where its mask is."""
    if mask is not None:  # normalised, so that a small masked area does not learn more slowly
        values = values * mask / _sample_mean(mask, keepdim=True).clamp(min=1e-6)
    return _sample_mean(values)


def _sample_mean(values: Tensor, keepdim: bool = False) -> Tensor:
    """The mean (B,) of each sample (B, ...) over all its dimensions."""
    return values.mean(dim=tuple(range(1, values.dim())), keepdim=keepdim)
