"""The learning rate of each update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from warpcore.errors import UserError

CYCLES = "lambdalinear"
"""The name of a schedule in `LinearCycles`."""
SCHEDULES = ("constant", "cosine", "linear", "rex", "polynomial", "inverse_sqrt", "warmup_stable_decay", CYCLES)
CYCLIC = ("cosine", "linear", "rex", "polynomial")
"""Those that may go down several times."""
ENDING = (*CYCLIC, "warmup_stable_decay")
"""Those that end at `min_lr_ratio`."""
WITHOUT_WARM_UP = 10_000
"""The updates of `inverse_sqrt` in place of those of a warm-up, as in transformers."""


@dataclass(frozen=True)
class LinearCycles:
    """A factor on the learning rate that goes up and down linearly in each of several cycles.

    This is `LambdaLinearScheduler` of latent diffusion and of NVIDIA's Cosmos; each list has one entry per cycle. In a
    cycle of `cycle_lengths` updates the factor rises from `f_start` to `f_max` in `warm_up_steps` updates, and then
    falls to `f_min`, which it reaches at the end.

    Raises:
        ValueError: the lists have different lengths, or a warm-up is not shorter than its cycle.
    """

    warm_up_steps: Sequence[int]
    cycle_lengths: Sequence[int]
    f_start: Sequence[float]
    f_max: Sequence[float]
    f_min: Sequence[float]

    def __post_init__(self):
        counts = {name: len(values) for name, values in vars(self).items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"write one entry per cycle into each list; there are {found}")
        for warm_up, length in zip(self.warm_up_steps, self.cycle_lengths, strict=True):
            if warm_up >= length:
                raise ValueError(
                    f"warm_up_steps: {warm_up} is not less than the {length} of cycle_lengths: write fewer steps, or "
                    "a longer cycle"
                )

    @property
    def updates(self) -> int:
        """Of all cycles."""
        return sum(self.cycle_lengths)

    def factor(self, finished: int) -> float:
        """The factor of an update before which `finished` were made. The last number of a cycle belongs to it."""
        number, start = 0, 0
        while finished > start + self.cycle_lengths[number]:
            start += self.cycle_lengths[number]
            number += 1
        place, warm_up, length = finished - start, self.warm_up_steps[number], self.cycle_lengths[number]
        low, high, end = self.f_start[number], self.f_max[number], self.f_min[number]
        if place < warm_up:
            return low + (high - low) / warm_up * place
        return end + (high - end) * (length - place) / (length - warm_up)


CYCLE_KEYS = tuple(field.name for field in fields(LinearCycles))


def lr_at(
    update: int,
    *,
    schedule: str,
    lr: float,
    warmup_updates: int,
    updates: int,
    min_lr_ratio: float = 0.0,
    num_cycles: int = 1,
    power: float = 1.0,
    decay_updates: int | None = None,
    cycles: LinearCycles | None = None,
) -> float:
    """The learning rate of an update, counted from 1.

    Warm-up is linear: update 1 runs at lr / warmup_updates, update `warmup_updates` at lr. From there `cosine`
    (arXiv:1608.03983, equation 5), `linear`, `rex` (arXiv:2107.04197, equation 3 with beta 0.9) and `polynomial`, what
    is left to the `power`, go to lr * min_lr_ratio, reached at update `updates`; with `num_cycles` they start again
    from lr at equal distances before it. `warmup_stable_decay` (arXiv:2404.06395, section 4) stays at lr and goes
    there in the last `decay_updates`, by default a tenth of all, like `cosine`. `inverse_sqrt` (arXiv:1706.03762,
    equation 3) falls with the root of the updates, counted so that warm-up ends at as many as it had. `lambdalinear`
    is lr times the factor of `cycles` alone.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"lr_schedule: {schedule!r} is unknown; write one of {', '.join(SCHEDULES)}")
    if schedule == CYCLES:
        return lr * cycles.factor(update - 1)
    if update < warmup_updates:
        return lr * update / warmup_updates
    if schedule == "constant":
        return lr
    peak = max(warmup_updates, 1)
    if schedule == "inverse_sqrt":
        begin = warmup_updates if warmup_updates > 1 else WITHOUT_WARM_UP
        return lr * math.sqrt(begin / (begin + update - peak))
    if schedule == "warmup_stable_decay":
        peak = max(peak, updates - (decay_updates or max(updates // 10, 1)))
        if update < peak:
            return lr
    length = max(updates - peak, 1)
    done = min(update - peak, length)
    # In whole numbers: a fraction that is rounded down would put the begin of a cycle at the end of the one before.
    remaining = _COURSES[schedule](1 - (num_cycles * done % length / length if done < length else 1)) ** power
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)


_COURSES = {
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "warmup_stable_decay": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "linear": lambda left: left,
    "polynomial": lambda left: left,
    "rex": lambda left: left / (0.1 + 0.9 * left),
}
"""The factor of what is left of a cycle, from 1 down to 0."""
