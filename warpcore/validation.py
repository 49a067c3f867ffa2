"""The loss of validation samples, and how it is split up by noise level and bucket.

With levels, everything that is drawn for a sample follows from its key (`Plan.validation_by_key`), and the levels are
fixed: what differs between two runs is the networks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from warpcore.data.reader import Batch
from warpcore.evaluation import Variants
from warpcore.processes import Processes
from warpcore.random import stable_hash
from warpcore.results import Losses


def levels(count: int) -> list[float]:
    """The middles of `count` equal parts of the noise levels from 0 to 1."""
    return [(number + 0.5) / count for number in range(count)]


def drawn(result: Losses) -> dict[str, Tensor]:
    """By name, the losses (B,) before weighting, and metrics, of a batch whose noise levels were drawn."""
    return {"loss": result.raw, **result.metrics}


def at_levels(results: Mapping[float, Losses], size: Sequence[int]) -> dict[str, Tensor]:
    """By name, (B,): the means over the levels of losses before weighting, and of metrics, and each level's losses.

    Args:
        results: by level. size: of the batch's bucket: (H, W), or (frames, H, W).
    """
    each = {level: drawn(result) for level, result in results.items()}
    means = {name: torch.stack([one[name] for one in each.values()]).mean(dim=0) for name in next(iter(each.values()))}
    # As a size is written in a config: width x height (x frames).
    means[f"loss/size_{'x'.join(map(str, reversed(size)))}"] = means["loss"]
    return means | {f"loss/level_{level:.4g}": one["loss"] for level, one in each.items()}


def validation_means(
    variants: Variants,
    batches: Callable[[], Iterable[tuple[Batch, list[int]]]],
    losses_of: Callable[[Batch], Mapping[str, Tensor]],
    seed: int,
    processes: Processes,
) -> dict[str, float]:
    """The means over the validation samples of all processes, by name.

    Args:
        batches: gives one pass over them, and the places in each that count (`Feed.validation`).
        losses_of: finds numbers (B,) by name.
        seed: of the networks' own randomness, the same each time.
    """
    means = {}
    for suffix, in_use in variants.items():
        totals: dict[str, Tensor] = {}
        with in_use():
            for batch, counted in batches():
                torch.manual_seed(stable_hash(seed, "validation", batch.number))
                for name, value in losses_of(batch).items():
                    value = value.double().cpu()[counted]
                    totals[name] = totals.get(name, 0) + torch.stack([value.sum(), value.new_tensor(len(value))])
        for name, total in _summed(totals, processes).items():
            means[f"validation_{name}{suffix}"] = total[0] / total[1] if total[1] else math.nan
    return means


def told(means: Mapping[str, float]) -> str:
    """The losses of `validation_means` in words: those of the weights, and of their average."""
    average = f" (average: {means['validation_loss_ema']:.4g})" if "validation_loss_ema" in means else ""
    wrong = [name for name, value in means.items() if math.isnan(value)]
    return f"validation loss {means['validation_loss']:.4g}{average}" + (f"; no number: {wrong[0]}" if wrong else "")


def _summed(totals: dict[str, Tensor], processes: Processes) -> dict[str, list[float]]:
    """The sums over all processes by name; a process that validated nothing knows no names."""
    everyone = processes.gather_of_data({name: total.tolist() for name, total in totals.items()})
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: [sum(values) for values in zip(*(one[name] for one in everyone if name in one), strict=True)]
            for name in names}  # fmt: skip
