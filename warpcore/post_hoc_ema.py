"""Averages of weights whose length is chosen after the run (EDM2, arXiv:2312.02696, section 3.2 and appendix C).

A run keeps two averages with power-function profiles, and exports snapshots of both every so often. The profile of any
other length is nearly a sum of theirs, and the average with that profile is the same sum of the snapshots.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from warpcore.checkpoint import Checkpoints
from warpcore.config import Config
from warpcore.ema import EMA, PowerProfile
from warpcore.errors import UserError
from warpcore.exports import Weights, stored_bytes
from warpcore.places import SNAPSHOTS
from warpcore.processes import Processes
from warpcore.resuming import Origin
from warpcore.state import TrainedState
from warpcore.text import format_bytes


class Profile(NamedTuple):
    """The shares of the weights of updates 1 to `update` in an average: of the weights at t it is (g + 1) t^g /
    update^(g + 1), where g is the exponent that belongs to `sigma_rel` (equation 8)."""

    update: int
    sigma_rel: float


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """The integrals of the products of profiles (len(rows), len(columns)), in float64 (appendix C)."""
    update, other = (np.array([one.update for one in group], float) for group in (rows, columns))
    power, others = (np.array([PowerProfile(one.sigma_rel).exponent for one in group]) for group in (rows, columns))
    update, power = update[:, None], power[:, None]
    # With ta <= tb: (ga + 1) (gb + 1) / (ga + gb + 1) * (ta / tb)^gb / tb.
    later = np.where(update < other, others, power)
    ratio = np.minimum(update, other) / np.maximum(update, other)
    return (power + 1) * (others + 1) / (power + others + 1) * ratio**later / np.maximum(update, other)


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """How much of each snapshot makes up a wanted average (algorithm 3 of the paper), and how far the sum of their
    profiles is from the wanted one, relative to that.

    The coefficients are divided by their sum, so that weights that never changed come out as they are.
    """
    target = inner_products(snapshots, [wanted])[:, 0]
    found = np.linalg.lstsq(inner_products(snapshots, snapshots), target, rcond=1e-14)[0]
    own = inner_products([wanted], [wanted])[0, 0]
    return found / found.sum(), float(np.sqrt(max(0.0, 1 - found @ target / own)))


def post_hoc_averages(trained: Mapping[str, nn.Module], config: Config) -> dict[str, dict[str, EMA]]:
    """The averages of the networks that are trained, by `sigma_rel`; none where the config asks for none."""
    if config.post_hoc_ema is None:
        return {}
    device = "cpu" if config.ema_device == "cpu" else None
    return {
        f"{sigma_rel:g}": {
            name: EMA(network, start=0, every=1, beta=PowerProfile(sigma_rel), device=device)
            for name, network in trained.items()
        }
        for sigma_rel in config.post_hoc_ema.sigma_rel
    }


def snapshot(
    state: TrainedState,
    weights: Callable[[], dict[str, dict[str, Tensor]]],
    export: Callable[[str, Mapping[str, Tensor]], Weights],
    update: int,
) -> dict[str, Weights]:
    """The exported weights of both averages, by file name (collective); see `evaluation.exported_weights`."""
    exported = {}
    for sigma_rel, averages in state.post_hoc.items():
        with state.in_use(averages):
            for name, tensors in weights().items():
                file = f"{SNAPSHOTS}/{update:08d}/{sigma_rel}/{name}"
                exported[file] = export(file, tensors)
    return exported


def disk_use(state: TrainedState, config: Config) -> list[str]:
    """What to tell of the disk at the start of a run: a line, or none."""
    if config.post_hoc_ema is None:
        return []
    dtype = getattr(torch, config.export_dtype or config.weights_dtype)
    tensors = [tensor for average in state.post_hoc_averages for tensor in average.state_dict().values()]
    size = sum(stored_bytes(tensor, dtype) for tensor in tensors)
    count = -(-config.updates // config.post_hoc_ema.every)
    return [
        f"post_hoc_ema: {count} snapshots of {format_bytes(size)}, {format_bytes(count * size)} at the end, in "
        f"{config.run_place}/{SNAPSHOTS}; averages of them: python3 tools/average.py --help"
    ]


def check_beginning(state: TrainedState, origin: Origin, own: Checkpoints, processes: Processes) -> None:
    """Where averages begin in the middle of a run (collective).

    Raises:
        UserError: beside snapshots of others, as sums of both would mean nothing.
    """
    stored = origin.checkpoints.stored(origin.update)
    new = [one for one in state.post_hoc if not any(name.startswith(f"post_hoc/{one}/") for name in stored)]
    if new and processes.on_main(lambda: own.has(SNAPSHOTS)):
        raise UserError(
            f"post_hoc_ema: its averages of sigma_rel {', '.join(new)} begin with this start, but {own.name}/"
            f"{SNAPSHOTS} has snapshots of earlier ones: move that folder elsewhere, or write the post_hoc_ema of then"
        )
