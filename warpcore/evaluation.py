"""What a run shows of itself beside its losses: validation loss, sample pictures, and the weights it publishes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from warpcore import optim
from warpcore.pictures import grid, save_png
from warpcore.random import stable_hash

if TYPE_CHECKING:
    from warpcore.core import WarpCore


@contextmanager
def weights_in_use(run: "WarpCore", average: bool) -> Iterator[None]:
    """Trained networks in evaluation mode, with the averaged weights if asked for; exactly as before afterwards."""
    optim.eval_mode(run.optimizers)
    for name in run.trainable:
        run.networks[name].eval()
    try:
        with torch.no_grad(), ExitStack() as swaps:
            for name in run.averages if average else ():
                swaps.enter_context(run.averages[name].applied_to(run.networks[name]))
            yield
    finally:
        optim.train_mode(run.optimizers)


def weights_to_publish(run: "WarpCore") -> dict[str, dict[str, Tensor]]:
    """State dicts for people by file name: the networks', and their averages' as NAME_ema."""
    weights = {}
    for suffix, average in _variants(run):
        with weights_in_use(run, average):
            for name, state in run.weights().items():
                # A copy: outside of the context the tensors hold other numbers again.
                weights[name + suffix] = {key: tensor.detach().clone() for key, tensor in state.items()}
    return weights


def validate(run: "WarpCore") -> None:
    """Report the mean loss over the validation samples, with the same noise each time."""
    for suffix, average in _variants(run):
        total = torch.zeros(2, dtype=torch.float64)
        with weights_in_use(run, average):
            for batch in run.feed.validation():
                torch.manual_seed(stable_hash(run.config.seed, "validation", batch.number))
                raw = run.forward(batch).raw
                total += batch.weight * torch.tensor([raw.float().sum().item(), len(raw)])
        loss, count = run.processes.sum(total).tolist()
        if count:
            run.metrics.add(run.update, **{f"validation_loss{suffix}": loss / count})


def draw(run: "WarpCore") -> None:
    """Draw pictures with the weights and with their average, from the same noise, side by side."""
    held_out = run.feed.held_out()
    with weights_in_use(run, average=False), run.autocast():
        rows = run.sample(held_out)
    if not rows:
        return
    if run.averages:
        with weights_in_use(run, average=True), run.autocast():
            for row, averaged in zip(rows, run.sample(held_out), strict=True):
                changed = {name for name, p in averaged.pictures.items() if not np.array_equal(p, row.pictures[name])}
                row.pictures |= {
                    f"{name} (EMA)": averaged.pictures[name] for name in averaged.pictures if name in changed
                }
    if not run.processes.is_main:
        return
    pictures = [picture for row in rows for picture in row.pictures.values()]
    captions = [f"{name}: {row.caption}" for row in rows for name in row.pictures]
    sheet = grid(pictures, columns=max(len(row.pictures) for row in rows), captions=captions)
    path = run.config.samples_folder / f"{run.update:08d}.png"
    save_png(path, sheet, {"update": str(run.update)})
    run.tracker.images(run.update, "samples", sheet, f"update {run.update}")
    run.progress.say(f"update {run.update}: samples in {path}")


def _variants(run: "WarpCore") -> list[tuple[str, bool]]:
    """(suffix, averaged or not): the weights, and where there is one their average."""
    return [("", False), ("_ema", True)][: 1 + bool(run.averages)]
