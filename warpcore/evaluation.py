"""What a run shows of its weights, and of their average: validation losses, sample pictures, exported weights.

Weights are looked at inside `variants`: by a suffix, a function that puts them in use (`TrainedState.in_use`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from warpcore.clips import save_clip, step_within
from warpcore.data.reader import Batch
from warpcore.exports import Weights
from warpcore.pictures import Cell, cells_metadata, grid_and_cells, save_png
from warpcore.results import Sampled
from warpcore.sharded import full
from warpcore.state import TrainedState
from warpcore.tracking import Tracker

MAX_COLUMNS = 8
"""Pictures side by side in a sheet of samples."""

Variants = Mapping[str, Callable[[], AbstractContextManager]]


def variants(state: TrainedState, averaged: bool) -> Variants:
    """The weights, and as `_ema` their average if wanted."""
    return {"": state.in_use} | ({"_ema": partial(state.in_use, state.averages)} if averaged else {})


def exported_weights(
    variants: Variants,
    weights: Callable[[], dict[str, dict[str, Tensor]]],
    export: Callable[[str, Mapping[str, Tensor]], Weights],
) -> dict[str, Weights]:
    """Exported weights by file name, those of an average as NAME_ema (collective).

    Args:
        weights: gives state dicts by file name, of the weights in use. export: takes one out.
    """
    exported = {}
    for suffix, in_use in variants.items():
        with in_use():
            exported |= {name + suffix: export(name + suffix, state) for name, state in weights().items()}
    return exported


def weight_norms(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The Euclidean norm of the parameters (`NETWORK.NAME`) of each network, over all shards (collective).

    In float32 for weights in bfloat16, too, which change by less than its digits.
    """
    networks: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        norm = full(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32))
        networks.setdefault(name.partition(".")[0], []).append(norm)
    return {f"weight_norm/{name}": torch.linalg.vector_norm(torch.stack(own)).item() for name, own in networks.items()}


def draw(
    variants: Variants,
    autocast: Callable[[], AbstractContextManager],
    held_out: Callable[[], Batch | None],
    sample: Callable[[Batch | None], list[Sampled]],
) -> tuple[list[Sampled], str | None]:
    """A row of pictures per sample, with the averaged weights' beside those that they change; from the same noise.

    Where memory is too short for it, there are no rows, and a message that says so.
    """
    try:
        return _drawn_rows(variants, autocast, held_out(), sample), None
    except (MemoryError, RuntimeError) as error:
        if not _is_short_of_memory(error):
            raise
        return [], f"no more sample pictures are drawn: there is too little memory for them ({_first_line(error)})"


def _drawn_rows(
    variants: Variants,
    autocast: Callable[[], AbstractContextManager],
    held_out: Batch | None,
    sample: Callable[[Batch | None], list[Sampled]],
) -> list[Sampled]:
    def drawn() -> Iterator[list[Sampled]]:
        for in_use in variants.values():
            with in_use(), autocast():
                rows = sample(held_out)
            yield rows

    drawings = drawn()
    rows = next(drawings)
    for averaged in drawings if rows else ():
        pairs = list(zip(rows, averaged, strict=True))
        changed = [
            name for name in rows[0].pictures
            if any(not np.array_equal(row.pictures[name], other.pictures[name]) for row, other in pairs)
        ]  # fmt: skip
        for row, other in pairs:
            row.pictures |= {f"{name} (EMA)": other.pictures[name] for name in changed}
    return rows


def show(rows: list[Sampled], path: Path, update: int, tracker: Tracker) -> str:
    """Write the sheet of rows to `path`, beside it a moving one where there are clips, and track both.

    Returns what to say of the moving one, where it is smaller than what was drawn.
    """
    still, cells = sheet(rows)
    if (moving := moving_sheet(rows)) is not None:
        save_clip(path, moving, rows[0].fps)
        tracker.clip(update, "clips", moving, rows[0].fps, f"update {update}")
    save_png(path, still, {"update": str(update)} | cells_metadata(cells))
    tracker.images(update, "samples", still, f"update {update}")
    step = _moving_step(rows)
    return f" (moving, they show one pixel of {step} x {step}: all of them are too many)" if step > 1 else ""


def sheet(rows: list[Sampled]) -> tuple[np.ndarray, list[Cell]]:
    """All pictures of rows in one, uint8 (H, W, 3), with captions; and where each is. Of clips, some frames."""
    pictures = [picture for row in rows for picture in row.pictures.values()]
    captions = [f"{name}: {row.caption}" for row in rows for name in row.pictures]
    per_sample = len(rows[0].pictures)
    return grid_and_cells(pictures, columns=per_sample * max(1, MAX_COLUMNS // per_sample), captions=captions)


def moving_sheet(rows: list[Sampled]) -> np.ndarray | None:
    """The sheet as a clip, uint8 (T, H, W, 3), in which all clips of rows move at once, and shorter ones end with a
    still; None where no row has a clip of several frames. Of more than `MAX_PIXELS`, clips are smaller in it."""
    step = _moving_step(rows)
    lengths = [len(one) for row in rows for one in row.pictures.values() if one.ndim == 4]

    def at(time: int) -> list[Sampled]:
        return [
            Sampled(
                row.caption,
                {
                    name: (one[min(time, len(one) - 1)] if one.ndim == 4 else one)[::step, ::step]
                    for name, one in row.pictures.items()
                },
            )
            for row in rows
        ]

    return np.stack([sheet(at(time))[0] for time in range(max(lengths))]) if max(lengths, default=1) > 1 else None


def _moving_step(rows: list[Sampled]) -> int:
    """The step between the pixels, and the rows, of pictures that a moving sheet shows."""
    pictures = [one for row in rows for one in row.pictures.values()]
    longest = max((len(one) for one in pictures if one.ndim == 4), default=1)
    return step_within(longest * sum(math.prod(one.shape[-3:-1]) for one in pictures)) if longest > 1 else 1


def _is_short_of_memory(error: Exception) -> bool:
    """The allocator of the CPU raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
