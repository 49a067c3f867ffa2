"""Lists of times that samplers step along: where each step begins, and where the last one ends.

Those of discrete schedules are timesteps, int64, from noise to clean. They end at -1, the clean signal; pipelines of
Stable Diffusion 1.5 end at timestep 0 instead (`set_alpha_to_one: false`). Spacings: arXiv:2305.08891, table 2.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from warpcore.diffusion.schedules import Schedule
from warpcore.diffusion.tables import TableSchedule
from warpcore.errors import UserError

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class TimeRule:
    """The timesteps that a sampler is used with, as published pipelines and diffusers do."""

    spacing: Spacing | Literal["respaced"] = "leading"
    """Where no other one is asked for."""
    end: int = -1
    """Where fractional times end, and the leading timesteps of Stable Diffusion: -1 is the clean signal, 0 the first
    timestep (`set_alpha_to_one: false`)."""
    fractional: bool = False
    """Whether the network is told times between two timesteps, which `linspace` and Karras sigmas give."""
    solver: bool = False
    """As DPM-Solver's: lists are of one step more, whose last timestep is left out; Karras sigmas reach from end to
    end of the schedule, and the network is told whole timesteps."""

    @property
    def takes_karras(self) -> bool:
        """Whether times may be spaced as Karras sigmas."""
        return self.solver or (self.fractional and self.end < 0)


TIME_RULES = {
    "pndm": TimeRule(end=0),
    "ddim": TimeRule(end=0),
    "ddpm": TimeRule(),
    "iddpm": TimeRule("respaced"),
    "dpm-solver": TimeRule("linspace", end=0, fractional=True),
    "euler": TimeRule(fractional=True),
    "euler_ancestral": TimeRule(fractional=True),
    "heun": TimeRule(fractional=True),
    "lcm": TimeRule("trailing"),
    "dpmpp_2m": TimeRule("linspace", solver=True),
    "dpmpp_2m_sde": TimeRule("linspace", solver=True),
    "unipc": TimeRule("linspace", solver=True),
    "res_2m": TimeRule("linspace", solver=True),
}
"""By the name of the sampler."""


@dataclass(frozen=True)
class Steps:
    """The steps of a drawing: where each begins, and where the last one ends."""

    number: int = 20
    """Of equal steps from time `start` to `end`."""
    start: float = 1.0
    end: float = 0.0
    times: Sequence[float] | Tensor | None = None
    """Falling times of the schedule, (number + 1,), instead of equal steps."""
    shift: float = 1.0
    """Of the schedule, in addition to its own."""
    schedule: Schedule | None = None
    """Another one than that of training."""

    def along(self, schedule: Schedule, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
        """logSNR (number + 1,), on the CPU, and the times as fractions, from 1 (noise) to 0.

        Args:
            schedule: of training.
            dtype: in which equal steps are computed.

        Raises:
            ValueError: there is no step, or times don't fall.
        """
        schedule = self.schedule or schedule
        if self.times is not None:
            times = falling(self.times)
            return schedule(times, shift=self.shift), schedule.fraction(times).tolist()
        number, start, end = self.number, self.start, self.end
        if number < 1 or not 0 <= end < start <= 1:
            raise ValueError(
                f"sampling needs number >= 1 and 0 <= end < start <= 1, not number={number}, start={start}, end={end}"
            )
        times = torch.linspace(start, end, number + 1, dtype=dtype)
        # The window of guidance is not asked with a float32 time, which may miss its end by a rounding.
        fractions = [start + (end - start) * step / number for step in range(number + 1)]
        return schedule(times, shift=self.shift), fractions


def leading_timesteps(steps: int, total: int = 1000, *, offset: int = 0, end: int = -1) -> Tensor:
    """(steps + 1,) from `offset` upwards in equal whole steps, as DDPM, DDIM and Stable Diffusion (offset 1) do."""
    _check_steps(steps, total)
    return _with_end(torch.arange(steps).flip(0) * (total // steps) + offset, end)


def trailing_timesteps(steps: int, total: int = 1000, *, end: int = -1) -> Tensor:
    """(steps + 1,) from the last timestep downwards, for schedules with zero terminal SNR."""
    _check_steps(steps, total)
    spacing = (total - total / steps) - total  # halves are rounded as numpy's arange does
    rounded = [round(total + step * spacing) - 1 for step in range(steps)]
    return _with_end(torch.tensor(rounded), end)


def linspace_timesteps(steps: int, total: int = 1000, *, end: int = -1) -> Tensor:
    """(steps + 1,) from the last timestep to the first, both included."""
    _check_steps(steps, total)
    spacing = (total - 1) / max(steps - 1, 1)  # halves are rounded as numpy's linspace does
    rounded = [round(step * spacing) for step in range(steps)]
    return _with_end(torch.tensor(rounded).flip(0), end)


def respaced_timesteps(respacing: str, total: int = 1000) -> Tensor:
    """(steps + 1,) as Improved DDPM, ADM and DiT choose them (`timestep_respacing`), ending at the clean signal.

    Args:
        respacing: "100" spreads 100 steps over all timesteps, with the first and the last; "10,15,20" does so in each
            of three equal parts of them, the least noisy one first; "ddim25" takes 25 from timestep 0 upwards, in
            equal whole steps.

    Raises:
        UserError: it is none of these, or there are too few timesteps.
    """
    if match := re.fullmatch(r"ddim(\d+)", respacing):
        wanted = int(match[1])
        for stride in range(1, total):
            if len(range(0, total, stride)) == wanted:
                return _with_end(torch.arange(0, total, stride).flip(0), -1)
        raise UserError(f"timestep respacing: no whole stride takes {wanted} of {total} timesteps")
    if not re.fullmatch(r"\d+(,\d+)*", respacing):
        raise UserError(f"timestep respacing: {respacing!r}; write a number, numbers such as 10,15,20, or ddim25")
    counts = [int(count) for count in respacing.split(",")]
    chosen, first = [], 0
    for part, count in enumerate(counts):
        size = total // len(counts) + (part < total % len(counts))
        _check_steps(count, size)
        stride = (size - 1) / max(count - 1, 1)
        # The published code sums the stride up, and rounds halves to even numbers.
        places = accumulate([stride] * (count - 1), initial=0.0)
        chosen += [first + round(place) for place in places]
        first += size
    return _with_end(torch.tensor(chosen).flip(0), -1)


def sampling_times(
    schedule: TableSchedule, steps: int, sampler: str, *, spacing: Spacing | None = None, karras: bool = False
) -> Tensor:
    """(steps + 1,) times at which a named sampler asks: whole timesteps (leading ones from the schedule's
    `steps_offset`), or float64 times from 1 to 0, and -1.

    spacing: by default that of the sampler's rule, and `trailing` for a schedule with zero terminal SNR, which leaves
        out no noise.

    Raises:
        UserError: too many steps, or Karras sigmas of pure noise, or with a sampler that takes whole timesteps.
    """
    rule = TIME_RULES[sampler]
    if karras and not rule.takes_karras:
        able = ", ".join(name for name, other in TIME_RULES.items() if other.takes_karras)
        raise UserError(f"karras: {sampler} steps along whole timesteps; Karras sigmas go with {able}")
    spacing = spacing or ("trailing" if schedule.zero_terminal_snr else rule.spacing)
    if karras and rule.solver:
        return karras_times(schedule, steps)
    more = int(rule.solver and spacing != "trailing")
    _check_steps(steps + more, schedule.steps)
    if spacing == "leading":
        end = rule.end if schedule.steps_offset else -1
        times = leading_timesteps(steps + more, schedule.steps, offset=schedule.steps_offset, end=end)
    elif spacing == "respaced":
        times = respaced_timesteps(str(steps), schedule.steps)
    elif spacing == "linspace" and rule.fractional and rule.end == 0:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    elif spacing == "linspace" and rule.fractional:
        times = torch.cat([torch.linspace(1, 0, steps, dtype=torch.float64), torch.tensor([-1.0])])
    elif spacing == "linspace":
        times = linspace_timesteps(steps + more, schedule.steps)
    else:
        times = trailing_timesteps(steps, schedule.steps)
    if karras:
        first, last = (times[[0, -2]] * (schedule.steps - 1 if times.is_floating_point() else 1)).tolist()
        return karras_times(schedule, steps, first=int(first), last=int(last))
    return torch.cat([times[:steps], times[-1:]])


def flow_times(steps: int, *, shift: float = 1.0, total: int = 1000) -> Tensor:
    """(steps + 1,) float64 times of a straight flow whose schedule has this shift, ending at the clean signal: as the
    published sampler of Stable Diffusion 3 has them, evenly from 1 to the shifted 1 / total."""
    _check_steps(steps, total)
    smallest = shift / (total + shift - 1)
    return torch.cat([torch.linspace(1, smallest, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def flow_sigma_times(sigmas: Sequence[float] | Tensor) -> Tensor:
    """(N + 1,) float64 times of a straight flow at N noise levels, falling sigmas = t / (1 - t), and the clean signal:
    the last step goes from the last sigma to what the network finds there."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return torch.cat([sigmas / (1 + sigmas), sigmas.new_zeros(1)])


def karras_sigmas(steps: int, high: float, low: float, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64 falling noise levels from `high` to `low`, between which sigma^(1/rho) falls evenly
    (arXiv:2206.00364, eq. 5)."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + torch.arange(steps + 1, dtype=torch.float64) / steps * (last - first)) ** rho


def last_part(times: Tensor, strength: float) -> Tensor:
    """The times of the last `strength` (0 to 1) of the steps, whole ones: for drawing that starts at a picture.

    Raises:
        UserError: no step is left.
    """
    steps = len(times) - 1
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise UserError(f"strength {strength} leaves none of {steps} steps; write a larger strength, or more steps")
    return times[steps - kept :]


def karras_times(schedule: TableSchedule, steps: int, *, first: int = -1, last: int = 0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64 times of a schedule, between whose sigmas sigma^(1/rho) falls evenly (arXiv:2206.00364,
    eq. 5), and the clean signal.

    first, last: timesteps of the largest and of the smallest sigma; -1 is the last of the table.

    Raises:
        UserError: the first timestep is pure noise, whose sigma is infinite.
    """
    _check_steps(steps, schedule.steps)
    logsnr = schedule.logsnr[[first, last]]
    if logsnr.isinf().any():
        raise UserError(
            "Karras sigmas need a finite largest one, but the schedule ends in pure noise (zero terminal SNR); take "
            "trailing timesteps"
        )
    high, low = (-logsnr / (2 * rho)).exp()  # sigma^(1/rho)
    sigmas = torch.lerp(high, low, torch.linspace(0, 1, steps, dtype=torch.float64)) ** rho
    times = schedule.timestep(-2 * sigmas.log()) / (schedule.steps - 1)
    return torch.cat([times, times.new_tensor([-1.0])])


def falling(times: Sequence[float] | Tensor) -> Tensor:
    """The times (steps + 1,) as a tensor on the CPU.

    Raises:
        ValueError: they are fewer than two, or don't fall.
    """
    times = torch.as_tensor(times).cpu()
    if times.dim() != 1 or len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError(f"sampling needs two or more times that fall, from noise to clean, not {times.tolist()}")
    return times


def _with_end(timesteps: Tensor, end: int) -> Tensor:
    return torch.cat([timesteps, timesteps.new_tensor([end])])


def _check_steps(steps: int, total: int) -> None:
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps: {steps} of {total} timesteps; write a number from 1 to {total}")
