"""What a run shows of itself beside its losses: validation loss, sample pictures, and the weights it publishes."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from warpcore import optim
from warpcore.ema import reshard
from warpcore.pictures import grid, save_png
from warpcore.random import stable_hash

if TYPE_CHECKING:
    from warpcore.core import WarpCore
    from warpcore.results import Sampled

MOST_COLUMNS = 8
"""Pictures side by side in a sheet of samples."""


@contextmanager
def weights_in_use(run: "WarpCore", average: bool) -> Iterator[None]:
    """Trained networks in evaluation mode, with the averaged weights if asked for; afterwards the weights are back."""
    optim.eval_mode(run.optimizers)
    for name in run.trainable:
        run.networks[name].eval()
        reshard(run.networks[name])  # gathered copies would hide that the weights change
    try:
        with torch.no_grad(), ExitStack() as swaps:
            for name in run.averages if average else ():
                swaps.enter_context(run.averages[name].applied_to(run.networks[name]))
            yield
    finally:
        optim.train_mode(run.optimizers)
        for name in run.trainable:
            reshard(run.networks[name])


def weights_to_publish(run: "WarpCore") -> dict[str, dict[str, Tensor]]:
    """State dicts to export by file name, and as NAME_ema their averages', on the CPU of the main process."""
    weights = {}
    for suffix, average in [("", False), ("_ema", True)][: 1 + bool(run.averages)]:
        with weights_in_use(run, average):
            for name, state in run.weights().items():
                weights[name + suffix] = {key: _on_main_cpu(run, tensor) for key, tensor in state.items()}
    return weights if run.processes.is_main else {}


def _on_main_cpu(run: "WarpCore", tensor: Tensor) -> Tensor | None:
    """A whole copy on the main process, one tensor at a time (collective); nothing on the others."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous() if run.processes.is_main else None


def evaluate(run: "WarpCore") -> None:
    """Validate and draw after an update whose checkpoint is written, or being written."""
    with run.metrics.not_training():
        validate(run)
        draw(run)
    run.checkpoints.bring_files()


def complete(run: "WarpCore") -> None:
    """Make what an earlier start, which ended after the save that this one goes on from, could not make any more."""
    if not run.update or not run.config.is_evaluated(run.update):
        return
    line = run.processes.on_main(run.metrics.last_line)  # the others may come before it has cut off a half line
    if run.feed.plan.has_validation and not any(name.startswith("validation_") for name in line):
        validate(run)
    if _draws(run) and not run.cannot_draw and not run.processes.on_main(lambda: _has_samples(run)):
        draw(run)


def _has_samples(run: "WarpCore") -> bool:
    path = samples_file(run)
    return (
        path.exists() if run.config.output_path else run.checkpoints.has(str(path.relative_to(run.config.run_folder)))
    )


def samples_file(run: "WarpCore") -> Path:
    return run.config.samples_folder / f"{run.update:08d}.png"


def validate(run: "WarpCore") -> None:
    """Report the mean loss and metrics over the validation samples, with the same noise each time."""
    means = {}
    for suffix, average in _variants(run):
        totals: dict[str, Tensor] = {}
        with weights_in_use(run, average):
            for batch, counted in run.feed.validation():
                torch.manual_seed(stable_hash(run.config.seed, "validation", batch.number))
                result = run.forward(batch)
                for name, value in {"loss": result.raw, **result.metrics}.items():
                    value = value.double().cpu()[counted]
                    totals[name] = totals.get(name, 0) + torch.stack([value.sum(), value.new_tensor(len(value))])
        for name, total in _summed(run, totals).items():
            means[f"validation_{name}{suffix}"] = total[0] / total[1] if total[1] else math.nan
    run.metrics.extend(run.update, means)
    run.tracker.log(run.update, means)
    for note in run.feed.take_notes():
        run.progress.say(note)
    if any(map(math.isnan, means.values())):
        run.progress.say(f"update {run.update}: the validation loss is no number")


def _summed(run: "WarpCore", totals: dict[str, Tensor]) -> dict[str, list[float]]:
    """The sums over all processes by name; a process that validated nothing knows no names."""
    everyone = run.processes.gather({name: total.tolist() for name, total in totals.items()})
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: [sum(values) for values in zip(*(one[name] for one in everyone if name in one), strict=True)]
            for name in names}  # fmt: skip


def draw(run: "WarpCore") -> None:
    """Draw pictures with the weights and with their average, from the same noise, side by side.

    Where memory is too short for it, a message says so, and the run goes on without pictures.
    """
    if run.cannot_draw or not _draws(run):
        return
    rows, shortage = [], None
    try:
        rows = _drawn_rows(run)
    except (MemoryError, RuntimeError) as error:
        if not _is_short_of_memory(error):
            raise
        shortage = f"no more sample pictures are drawn: there is too little memory for them ({_first_line(error)})"
    # One process alone may be short of memory; all of them have to agree on whether they draw the next time.
    run.cannot_draw = run.processes.first_of(shortage)
    if run.cannot_draw:
        run.progress.say(run.cannot_draw)
        return
    for note in run.feed.take_notes():
        run.progress.say(note)
    if not rows or not run.processes.is_main:
        return
    pictures = [picture for row in rows for picture in row.pictures.values()]
    captions = [f"{name}: {row.caption}" for row in rows for name in row.pictures]
    per_sample = len(rows[0].pictures)
    sheet = grid(pictures, columns=per_sample * max(1, MOST_COLUMNS // per_sample), captions=captions)
    path = samples_file(run)
    save_png(path, sheet, {"update": str(run.update)})
    run.tracker.images(run.update, "samples", sheet, f"update {run.update}")
    run.progress.say(f"update {run.update}: samples in {path}")


def _draws(run: "WarpCore") -> bool:
    """Whether the use case has anything to show."""
    from warpcore.core import WarpCore

    return type(run).sample is not WarpCore.sample


def _drawn_rows(run: "WarpCore") -> list["Sampled"]:
    """A row of pictures per sample, with the averaged weights' beside those that they change."""
    held_out = run.feed.to_draw(run.data_to_draw()) if run.draws_samples else None
    with weights_in_use(run, average=False), run.autocast():
        rows = run.sample(held_out)
    if not rows or len(_variants(run)) == 1:
        return rows
    with weights_in_use(run, average=True), run.autocast():
        pairs = list(zip(rows, run.sample(held_out), strict=True))
    drawn = [
        name for name in rows[0].pictures
        if any(not np.array_equal(row.pictures[name], other.pictures[name]) for row, other in pairs)
    ]  # fmt: skip
    for row, averaged in pairs:
        row.pictures |= {f"{name} (EMA)": averaged.pictures[name] for name in drawn}
    return rows


def _is_short_of_memory(error: Exception) -> bool:
    """The allocator of the CPU raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _variants(run: "WarpCore") -> list[tuple[str, bool]]:
    """(suffix, averaged or not): the weights, and their average once it differs from them."""
    averaged = bool(run.averages) and run.update > run.config.ema_start_iters
    return [("", False), ("_ema", True)][: 1 + averaged]
