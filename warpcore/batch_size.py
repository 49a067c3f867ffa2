"""How `batch_size` is split over processes and accumulation steps."""

import math

from warpcore.config import Config
from warpcore.config_keys import MAX_MICRO_BATCH
from warpcore.errors import UserError


def split_batch(config: Config, num_processes: int, saved: dict | None) -> tuple[int | None, int]:
    """(micro-batch size, accumulation steps) for `batch_size` over the processes; where buckets have micro-batch sizes
    of their own, (None, steps).

    Raises:
        UserError: the numbers do not divide, or contradict each other.
    """
    if config.own_micro_batches is not None:
        return None, _split_micro_batches(config.own_micro_batches, num_processes)
    batch, micro, steps = config.batch_size, config.micro_batch_size, config.grad_accum_steps
    goes_on = micro is None and bool(saved)
    if goes_on:
        micro, steps = saved["micro_batch_size"], None
    if micro is None:
        parts = num_processes * (steps or 1)
        if batch % parts:
            raise UserError(
                f"batch_size {batch} does not divide by {num_processes} processes x {steps or 1} grad_accum_steps: "
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
            whole = [] if batch % micro else divisors(batch // micro)
            fewer = f"start {' or '.join(map(str, whole))} process{'es' * (whole != [1])}, or " if whole else ""
            fresh = f", or on_data_change: new_epoch and micro_batch_size: {fitting[-1]}" if fitting else ""
            raise UserError(
                f"batch_size {batch} does not divide by the micro-batches of {micro} that the run began with x "
                f"{num_processes} processes: {fewer}write batch_size: "
                f"{micro * num_processes * math.ceil(batch / (micro * num_processes))}{fresh}"
            )
        raise UserError(
            f"batch_size {batch} does not divide by micro_batch_size {micro} x {num_processes} processes: "
            + (f"write micro_batch_size: {' or '.join(map(str, fitting))}" if fitting else "use fewer processes")
        )
    derived = batch // (micro * num_processes)
    if steps is not None and steps != derived:
        raise UserError(
            f"grad_accum_steps {steps} contradicts batch_size {batch} / (micro_batch_size {micro} x {num_processes} "
            f"processes) = {derived}: remove grad_accum_steps"
        )
    return micro, derived


def _split_micro_batches(per_update: int, num_processes: int) -> int:
    if per_update % num_processes:
        near = max(per_update // num_processes, 1) * num_processes
        raise UserError(
            f"micro_batches_per_update {per_update} does not divide by {num_processes} processes: write "
            f"micro_batches_per_update: {near}, or start {' or '.join(map(str, divisors(per_update)))} processes"
        )
    return per_update // num_processes


def fitting_sizes(batch_size: int, num_processes: int) -> list[int]:
    """The micro-batch sizes, ascending, that divide a batch over processes; none where the processes don't."""
    return [] if batch_size % num_processes else divisors(batch_size // num_processes)


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    low = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*low, *(number // one for one in low)})
