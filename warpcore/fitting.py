"""Changes of a config that take less of a GPU's memory, and those that are enough and cost least."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol

from warpcore import optim
from warpcore.batch_size import divisors
from warpcore.config import Config

Keys = dict[str, object]
Choice = tuple[int, ...]
"""Which option of each change is taken, 0 being none."""


class Asked(Protocol):
    """What a change may ask of a run."""

    config: Config
    processes: int
    micro_batch: int | None
    accumulation: int
    levels: Sequence[int]
    """Of activation checkpointing, those that all trained networks offer."""
    swappable: int
    """How many blocks of a frozen base can wait in the CPU's memory."""


class Change(NamedTuple):
    options: Callable[[Asked], Sequence[Keys]]
    """Keys to write, each option taking less memory of the GPU than the one before it; none where it's of no use."""
    cost: str
    """What a user pays for it."""
    at_start: bool = False
    """Whether a run may choose it by itself (`fit`): it leaves updates as they are, but for rounding, and the run's
    processes as well."""


def _average(run: Asked) -> list[Keys]:
    averages = run.config.ema_start_iters is not None or run.config.post_hoc_ema is not None
    return [{"ema_device": "cpu"}] if averages and not run.config.fsdp_cpu_offload else []


def _offload(run: Asked, *what: str) -> Keys:
    return {"offload": [*dict.fromkeys([*run.config.offload, *what])]}


def _levels(run: Asked, lowest: int) -> list[Keys]:
    return [{"activation_checkpointing": level} for level in run.levels if level >= lowest]


def _micro_batches(run: Asked) -> list[Keys]:
    """Smaller ones, which make the same update."""
    if run.micro_batch is None:  # that of each bucket
        return []
    explicit = run.config.grad_accum_steps is not None
    return [
        {"micro_batch_size": size}
        | ({"grad_accum_steps": run.accumulation * run.micro_batch // size} if explicit else {})
        for size in reversed(divisors(run.micro_batch)[:-1])
    ]


def _sent_activations(run: Asked) -> list[Keys]:
    lowest = max(run.config.activation_checkpointing, 1)
    return [_offload(run, "encoders", "activations") | level for level in _levels(run, lowest)]


def _swapped(run: Asked) -> list[Keys]:
    own = getattr(run.config, "swap_blocks", None)
    if own is None or run.processes > 1:
        return []
    return [{"activation_checkpointing": 3, "swap_blocks": count} for count in range(own + 1, run.swappable + 1)]


def _eight_bits(run: Asked) -> list[Keys]:
    return [{"frozen_weights": "int8"}] if getattr(run.config, "frozen_weights", "") is None else []


def _came(run: Asked) -> list[Keys]:
    return [{"optimizer": "came"}] if run.config.optimizer == "adamw" else []


def _fused(run: Asked) -> list[Keys]:
    clip = run.config.clip_grad_norm
    own = {} if clip is None else {"clip_grad_norm": None, "clip_tensor_norm": clip}
    return [{"fused_backward": True} | own]


def _shards(run: Asked, *more: str) -> list[Keys]:
    four_bits = getattr(run.config, "frozen_weights", None) == "nf4"
    can = optim.supports_dtensor(run.config.optimizer) and not four_bits
    return [dict.fromkeys(("use_fsdp", *more), True)] if can and (more or run.processes > 1) else []


CHANGES = (
    Change(_average, "the device waits when the average moves (ema_iters)", at_start=True),
    Change(lambda run: [_offload(run, "encoders")], "frozen networks are copied to the GPU for each use",
           at_start=True),
    Change(lambda run: _levels(run, run.config.activation_checkpointing + 1),
           "blocks compute twice: up to 1.4 times the time", at_start=True),
    Change(_micro_batches, "the same update in more and smaller passes (a run that has begun also needs "
           "on_data_change=new_epoch)"),
    Change(_shards, "weights travel between the GPUs"),
    Change(_sent_activations, "blocks compute twice, and what checkpointing keeps travels to the CPU's "
           "memory and back", at_start=True),
    Change(_swapped, "blocks compute twice, and weights of the frozen network travel to the GPU twice in each pass, "
           "beside the computation", at_start=True),
    Change(_eight_bits, "the frozen network is rounded to eight bits, and multiplies in them"),
    Change(lambda run: [{"weights_dtype": "bfloat16"}], "trained weights are rounded, at random, to bfloat16"),
    Change(_came, "another optimizer: its learning rate has to be found, and it wants a warm-up"),
    Change(_fused, "gradients are clipped tensor by tensor, if clip_grad_norm clipped them together"),
    Change(lambda run: _shards(run, "fsdp_cpu_offload"),
           "weights and gradients travel in each pass, and the optimizer steps on the CPU: slow"),
)  # fmt: skip
"""From the cheapest on: what costs next to nothing, then time, then exactness, then much time. Where two changes write
one key, the later counts."""
AT_START = tuple(change for change in CHANGES if change.at_start)


class Fitting:
    """The search for the changes of a run that cost least.

    allowed: whether the config takes keys, without building anything.
    """

    def __init__(self, run: Asked, allowed: Callable[[Keys], bool], changes: Sequence[Change] = CHANGES):
        self.run, self.allowed, self.changes = run, allowed, changes
        self.options = [[keys for keys in change.options(run) if self._differing(keys)] for change in changes]

    def _differing(self, keys: Keys) -> Keys:
        return {key: value for key, value in keys.items() if getattr(self.run.config, key) != value}

    def keys(self, choice: Choice) -> Keys:
        """What a choice writes."""
        chosen = [options[taken - 1] for options, taken in zip(self.options, choice, strict=True) if taken]
        return self._differing({key: value for keys in chosen for key, value in keys.items()})

    def costs(self, choice: Choice) -> Iterator[tuple[Keys, str]]:
        """The keys of each change in a choice, and what they cost."""
        written = self.keys(choice)
        for change, options, taken in zip(self.changes, self.options, choice, strict=True):
            if taken:
                own = {key: value for key, value in options[taken - 1].items() if written.get(key) == value}
                yield own, change.cost

    def cheapest(self, needs: Callable[[Keys], float | None], usable: float) -> tuple[bool, Choice]:
        """Whether any choice fits `usable` bytes, and of those which do the one whose dearest change is the cheapest,
        then whose second is, and so on; else the one that needs least.

        needs: bytes of the GPU with some keys, None where the run can't have them; asked often, of the same too.
        """
        found = [self._cheapest(most, needs, usable) for most in self.largest()]
        return min(found, key=lambda one: (not one[0], 0 if one[0] else needs(self.keys(one[1])), one[1][::-1]))

    def _cheapest(self, most: Choice, needs: Callable[[Keys], float | None], usable: float) -> tuple[bool, Choice]:
        """That of changes that all go together."""

        def needed(choice: Sequence[int]) -> float | None:
            return needs(self.keys(choice))

        choice = [0] * len(most)
        rows = [row for row, taken in enumerate(most) if taken]
        least = needed(choice)
        for row in rows:  # take more, from the cheapest on
            if least is not None and least <= usable:
                break
            choice[row] = most[row]
            if (least := needed(choice)) is None:
                choice[row] = 0
        if least is None or least > usable:
            return False, tuple(choice)
        for row in reversed(range(len(most))):  # and give back what isn't needed, from the dearest on
            if choice[row]:
                choice[row] = self._least(choice, row, needed, usable)
        return True, tuple(choice)

    def _least(self, choice: Sequence[int], row: int, needed: Callable[[Choice], float | None], usable: float) -> int:
        """The first option of a change that fits beside the others of a choice, of which its own fits; 0, none, if
        that does, which may take less than the first option, as this may write a key of an earlier change."""

        def with_option(taken: int) -> float:
            found = needed((*choice[:row], taken, *choice[row + 1 :]))
            return math.inf if found is None else found

        too_much, enough = (0, with_option(0)), (choice[row], with_option(choice[row]))
        if too_much[1] <= usable:
            return 0
        tries = 0
        while enough[0] - too_much[0] > 1:  # options of one change mostly lie on a line: count few of them
            tries += 1
            option = _on_line(too_much, enough, usable) if tries % 4 else (too_much[0] + enough[0]) // 2
            found = option, with_option(option)
            too_much, enough = (too_much, found) if found[1] <= usable else (found, enough)
        return enough[0]

    def largest(self) -> list[Choice]:
        """The most of all changes that go together: several choices, where some exclude others."""
        alone = [row for row in range(len(self.options)) if self.options[row] and self._are_allowed([row])]
        excluded = [pair for pair in combinations(alone, 2) if not self._are_allowed(pair)]
        return [self._most(rows) for rows in _independent(frozenset(alone), excluded)]

    def _are_allowed(self, rows: Sequence[int]) -> bool:
        return self.allowed(self.keys(self._most(rows)))

    def _most(self, rows: Sequence[int] | frozenset[int]) -> Choice:
        return tuple(len(options) if row in rows else 0 for row, options in enumerate(self.options))


def _independent(rows: frozenset[int], excluded: Sequence[tuple[int, int]]) -> list[frozenset[int]]:
    """The largest sets of rows that hold none of the pairs."""
    pair = next((pair for pair in excluded if rows.issuperset(pair)), None)
    if pair is None:
        return [rows]
    found = [*dict.fromkeys(one for row in pair for one in _independent(rows - {row}, excluded))]
    return [one for one in found if not any(one < other for other in found)]


def _on_line(too_much: tuple[int, float], enough: tuple[int, float], usable: float) -> int:
    """The first option that fits, between one that doesn't and one that does, if what options need lies on a line."""
    (first, above), (last, below) = too_much, enough
    share = (above - usable) / (above - below) if math.isfinite(above) else 0.5
    return min(max(first + math.ceil(share * (last - first)), first + 1), last - 1)


def on_command_line(keys: Keys) -> str:
    """Keys as arguments to paste behind a config."""
    return " ".join(f"{key}={_text(value)}" for key, value in keys.items())


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"'[{','.join(map(_text, value))}]'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
