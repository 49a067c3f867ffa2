"""What a training run will need of memory, and which changes of its config cost least where that is too much."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from pydantic import ValidationError

from warpcore.batch_size import split_batch
from warpcore.block_swap import swappable
from warpcore.compute import check_graphs
from warpcore.config import Config
from warpcore.errors import UserError
from warpcore.fitting import AT_START, CHANGES, Change, Choice, Fitting, Keys, on_command_line
from warpcore.networks import Checkpointing
from warpcore.processes import check_divides
from warpcore.progress_bar import ProgressBar
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes
from warpcore.resuming import Origin
from warpcore.signals import STOPPED_EARLY
from warpcore.use_case import UseCase

GIB = 2**30
USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's own, kernels' workspaces and gaps between tensors."""
SHOWN_SECONDS = 5
"""Counting that takes longer is shown."""
LEVELS = (0, 1, 2, 3)
OF_UPDATES = ("activation_checkpointing", "micro_batch_size", "grad_accum_steps")
"""Keys that change nothing of what is in memory between updates."""
BETWEEN_UPDATES = ("ema_device",)
"""Keys that change nothing of what is in memory only during updates."""


class _Stopped(Exception):
    """A signal asked for a stop."""


def fitted(run: UseCase, origin: Origin | None, stopping: Callable[[], bool] = lambda: False) -> Config:
    """The config of a run with the changes that its `fit` asks for: those that cost least and leave its updates as
    they are (collective).

    Args:
        origin: the checkpoint that the run goes on from.
        stopping: whether a signal has asked for a stop. Counting then ends.

    Raises:
        UserError: no such changes are enough.
        SystemExit: a signal asked for a stop; its status is STOPPED_EARLY.
    """
    config = run.config
    if config.fit is None:
        return config
    if config.processes_per_sample > 1:
        raise UserError(
            "fit: counts clips as a whole, and sequence_shards splits them: remove fit, and write what "
            "python3 tools/memory.py suggests and a try confirms"
        )
    keys = run.processes.on_main_at_length(lambda: _cheapest(run, origin, stopping))
    if keys is None:
        raise SystemExit(STOPPED_EARLY)
    return config.model_copy(update=keys)


def _cheapest(run: UseCase, origin: Origin | None, stopping: Callable[[], bool]) -> Keys | None:
    """The keys to write; None where it was stopped."""
    config, processes = run.config, run.processes.count
    usable = f"fit: of {config.fit:g} GiB, {gib(USABLE * config.fit * GIB)} are usable"
    _say(f"{usable}; counting on shapes what the run needs")
    if run.device.type != "cuda":
        _say(f"fit: on {run.device.type.upper()}, what should wait in the CPU's memory frees nothing")

    def before_count() -> None:
        if stopping():
            raise _Stopped
        counts.update()

    try:
        with counting() as counts:
            plan = Plan(type(run), config, run.device.type, processes, AT_START, origin, before_count)
            fits, choice, needs = plan.cheapest(config.fit * GIB)
    except _Stopped:
        _say("fit: stopped while it counted; the same command counts again")
        return None
    keys = plan.fitting.keys(choice)
    if not fits:
        smaller = "" if plan.micro_batch == 1 else "a smaller micro_batch_size, or "
        raise UserError(
            f"{usable}, and the least that the run needs with the same updates is {gib(needs.total)} GiB: write "
            f"{smaller}one of the changes of other kinds that this finds: {_to_search_all(run, config.fit)}"
        )
    _say(f"fit: {gib(needs.total)} GiB and {gib(needs.on_cpu)} GiB of the CPU's memory for each process, with "
         f"{on_command_line(keys) or 'the config as it is'}")  # fmt: skip
    for written, cost in plan.fitting.costs(choice):
        _say(f"- {on_command_line(written)}: {cost}")
    return keys


def counting() -> ProgressBar:
    """How many settings have been counted, shown where that takes long."""
    return ProgressBar(desc="counting", delay=SHOWN_SECONDS, bar_format="{desc}: {n_fmt} settings in {elapsed}")


def _to_search_all(run: UseCase, memory: float) -> str:
    """The command that also searches among changes that a run doesn't choose by itself. memory: GiB."""
    device = ["--device", "cpu"] if run.device.type == "cpu" else []
    options = ["--processes", str(run.processes.count), "--gpu-memory", f"{memory:g}", *device]
    return shlex.join(["python3", "tools/memory.py", *sys.argv, *options])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Plan:
    """What a run needs per process, for its settings and for others."""

    def __init__(
        self,
        use_case: type[UseCase],
        config: Config,
        device: str,
        processes: int = 1,
        changes: Sequence[Change] = CHANGES,
        origin: Origin | None = None,
        before_count: Callable[[], object] = lambda: None,
    ):
        """
        Args:
            device: the kind that it will run on, `cuda` or `cpu`.
            changes: those that may be made where memory is short.
            origin: the checkpoint that the run goes on from, with whose micro-batches.
            before_count: is called before each time that the run's networks are built on shapes.
        """
        self.use_case, self.config, self.device, self.processes = use_case, config, device, processes
        self.changes, self.origin, self.before_count = changes, origin, before_count
        check_divides("sequence_shards", config.processes_per_sample, processes)
        self.micro_batch, self.accumulation = self._split(config)
        self._between: dict[str, Needs] = {}
        self._counted: dict[str, tuple[Needs, Needs]] = {}

    def _split(self, config: Config) -> tuple[int | None, int]:
        saved = self.origin.values.get("feed") if self.origin else None
        return split_batch(config, self.processes // config.processes_per_sample, saved)

    def with_keys(self, keys: Keys) -> Config:
        """The config with other keys, about which nothing is logged.

        Raises:
            ValidationError, UserError: they can't be together.
        """
        if keys:
            type(self.config).model_validate(self.config.model_dump() | keys)
        config = self.config.model_copy(update=keys)  # which of its keys were written stays known
        self._split(config)
        return config

    def shapes(self, keys: Keys) -> OnShapes:
        """The run with other keys; raises as `with_keys` does."""
        self.before_count()
        return OnShapes(self.use_case, self.with_keys(keys), self.device, self.processes, self.origin)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that is computed in."""
        return self.shapes({}).dtype

    def allows(self, keys: Keys) -> bool:
        """Whether the config takes these keys, on its device."""
        try:
            config = self.with_keys(keys)
            sharded = config.use_fsdp and (self.processes > 1 or config.fsdp_cpu_offload)
            check_graphs(config, torch.device(self.device), sharded)
        except (ValidationError, UserError):
            return False
        return True

    def needs(self, keys: Keys, usable: float = math.inf) -> Needs | None:
        """With other keys, for updates of the largest bucket; None where the run can't have them.

        usable: what takes more bytes even between updates is counted without its activations, which takes less time.
        """
        known, of_updates = _without(keys, OF_UPDATES), _without(keys, BETWEEN_UPDATES)
        between = self._between.get(known)
        if between is None or (between.total <= usable and of_updates not in self._counted):
            try:
                with self.shapes(keys) as shapes:
                    between = self._between[known] = shapes.between_updates()
                    if between.total <= usable and of_updates not in self._counted:
                        level, size = shapes.config.activation_checkpointing, bucket_sizes(shapes.run)[0]
                        self._counted[of_updates] = self.of_bucket(shapes, size, level), between
            except (ValidationError, UserError):  # such as bfloat16 weights of a network with batch norms
                if not keys:
                    raise
                return None
        if between.total > usable:
            return between
        needs, without = self._counted[of_updates]
        return replace(needs, ema=between.ema, on_cpu=needs.on_cpu + between.on_cpu - without.on_cpu)

    def of_bucket(self, shapes: OnShapes, size: tuple[int, ...], level: int) -> Needs:
        """For updates of a bucket, with a level of activation checkpointing."""
        micro, accumulation = self._split(shapes.config)
        shapes.set_checkpointing(level)
        own = shapes.run.config.buckets(shapes.run.bucket_factor).micro_batch_sizes
        return shapes.needs(size, own[size] if micro is None else micro, accumulation)

    @cached_property
    def levels(self) -> Sequence[int]:
        """Of activation checkpointing, those that all trained networks offer."""
        with self.shapes({}) as shapes:
            if shapes.run.block_swaps:
                return (self.config.activation_checkpointing,)
            trained = [shapes.run.networks[name] for name in shapes.run.trainable]
            return LEVELS if all(isinstance(network, Checkpointing) for network in trained) else (0,)

    @cached_property
    def swappable(self) -> int:
        """How many blocks of a frozen base can wait in the CPU's memory."""
        with self.shapes({}) as shapes:
            return sum(len(swappable(shapes.run.networks[name])) for name in shapes.run.swapped_blocks())

    def levels_and_buckets(self, every_bucket: bool) -> list[tuple[int, tuple[int, ...], Needs]]:
        """What updates of the largest bucket need with each level of activation checkpointing, and with the config's
        own level those of the others: level, size, needs."""
        own, levels = self.config.activation_checkpointing, self.levels
        with self.shapes({}) as shapes:
            sizes = bucket_sizes(shapes.run)
            rows = [(level, sizes[0]) for level in levels] + [(own, size) for size in sizes[1:] if every_bucket]
            between = shapes.between_updates()
            table = [(level, size, self.of_bucket(shapes, size, level)) for level, size in rows]
        for level, _, needs in table[: len(levels)]:
            keys = {} if level == own else {"activation_checkpointing": level}
            self._counted[_without(keys, BETWEEN_UPDATES)] = needs, between
        return table

    @cached_property
    def fitting(self) -> Fitting:
        """The search for what fits."""
        return Fitting(self, self.allows, self.changes)

    def cheapest(self, memory: float) -> tuple[bool, Choice, Needs]:
        """Whether anything fits a GPU of `memory` bytes; what costs least and does, or else needs least; its needs."""
        usable = USABLE * memory

        def total(keys: Keys) -> float | None:
            needs = self.needs(keys, usable)
            return None if needs is None else needs.total

        fits, choice = self.fitting.cheapest(total, usable)
        return fits, choice, self.needs(self.fitting.keys(choice))


def _without(keys: Keys, left_out: Sequence[str]) -> str:
    """What counts with these keys are known by."""
    return str(sorted((key, value) for key, value in keys.items() if key not in left_out))


def gib(size: float) -> str:
    """Bytes in GiB, with three digits."""
    value = size / GIB
    return "0" if not value else f"{value:.{max(0, 2 - int(math.log10(max(value, 0.01))))}f}"
