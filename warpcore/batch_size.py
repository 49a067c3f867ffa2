"""How `batch_size` is split over processes and accumulation steps."""

import math

from warpcore.config import Config
from warpcore.config_keys import MAX_MICRO_BATCH
from warpcore.errors import UserError


def split_batch(config: Config, num_processes: int, saved: dict | None) -> tuple[int | None, int]:
    """(micro-batch size, accumulation steps) for `batch_size` over the processes; where buckets have micro-batch sizes
    of their own, (None, steps).

    Args:
        num_processes: those that have data of their own; where several compute each sample together, groups of them.

    Raises:
        UserError: the numbers do not divide, or contradict each other.
    """
    micro, steps = _split(config, num_processes, saved)
    if config.fused_backward and steps > 1:
        raise UserError(
            f"fused_backward: an update is one micro-batch, and this run has {steps} for an update: write "
            f"batch_size: {micro}, or micro_batch_size: {config.batch_size} with on_data_change: new_epoch, or remove "
            "fused_backward"
        )
    return micro, steps


def _split(config: Config, num_processes: int, saved: dict | None) -> tuple[int | None, int]:
    if config.own_micro_batches is not None:
        return None, _split_micro_batches(config, num_processes)
    batch, micro, steps = config.batch_size, config.micro_batch_size, config.grad_accum_steps
    goes_on, everyone = micro is None and bool(saved), _named(config, num_processes)
    if goes_on:
        micro, steps = saved["micro_batch_size"], None
    if micro is None:
        parts = num_processes * (steps or 1)
        if batch % parts:
            raise UserError(
                f"batch_size {batch} does not divide by {everyone} x {steps or 1} grad_accum_steps: "
                f"write batch_size: {batch // parts * parts or parts} or {(batch // parts + 1) * parts}"
            )
        if batch // parts > MAX_MICRO_BATCH:
            raise UserError(
                f"batch_size {batch} makes micro-batches of {batch // parts}, at most {MAX_MICRO_BATCH} are possible: "
                "write micro_batch_size"
            )
        return batch // parts, steps or 1
    if batch % (micro * num_processes):
        fitting = fitting_sizes(batch, num_processes)
        if goes_on:
            fewer = "" if batch % micro else f"start {_starts(config, batch // micro)}, or "
            fresh = f", or on_data_change: new_epoch and micro_batch_size: {fitting[-1]}" if fitting else ""
            raise UserError(
                f"batch_size {batch} does not divide by the micro-batches of {micro} that the run began with x "
                f"{everyone}: {fewer}write batch_size: "
                f"{micro * num_processes * math.ceil(batch / (micro * num_processes))}{fresh}"
            )
        raise UserError(
            f"batch_size {batch} does not divide by micro_batch_size {micro} x {everyone}: "
            + (f"write micro_batch_size: {' or '.join(map(str, fitting))}" if fitting else "use fewer processes")
        )
    derived = batch // (micro * num_processes)
    if steps is not None and steps != derived:
        raise UserError(
            f"grad_accum_steps {steps} contradicts batch_size {batch} / (micro_batch_size {micro} x {everyone}) = "
            f"{derived}: remove grad_accum_steps"
        )
    return micro, derived


def _split_micro_batches(config: Config, num_processes: int) -> int:
    per_update = config.own_micro_batches
    if per_update % num_processes:
        near = max(per_update // num_processes, 1) * num_processes
        raise UserError(
            f"micro_batches_per_update {per_update} does not divide by {_named(config, num_processes)}: write "
            f"micro_batches_per_update: {near}, or start {_starts(config, per_update)}"
        )
    return per_update // num_processes


def _named(config: Config, num_processes: int) -> str:
    """What errors call them."""
    each = config.processes_per_sample
    return f"{num_processes} {'' if each == 1 else f'groups of {each} (sequence_shards) '}processes"


def _starts(config: Config, number: int) -> str:
    """How many processes may be started for a number of micro-batches."""
    counts = [one * config.processes_per_sample for one in divisors(number)]
    return f"{' or '.join(map(str, counts))} process{'es' * (counts != [1])}"


def fitting_sizes(batch_size: int, num_processes: int) -> list[int]:
    """The micro-batch sizes, ascending, that divide a batch over processes; none where the processes don't."""
    return [] if batch_size % num_processes else divisors(batch_size // num_processes)


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    low = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*low, *(number // one for one in low)})
