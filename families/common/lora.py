"""LoRA on any network: adapters to train, and LoRAs of files merged into weights, several at once.

add_adapters       put adapters where `module_filters` find layers; then train them
adapters_of        what they are, to be written to a file (`families.common.lora_files`)
merge_loras        the changes of several files, each with its strength, added to the weights
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from families.common.lora_formats import Adapter, Lora, split
from families.common.weight_source import listed_weights
from modules import lora
from modules.lora import LoraSettings, LowRank, adapters, places
from warpcore.errors import UserError
from warpcore.loading import load_deferred
from warpcore.patterns import searching


class LoraError(UserError):
    """Adapters that cannot be: a filter that finds no layer, a rank that is too large."""


def add_adapters(network: nn.Module, filters: Sequence[str], settings: LoraSettings) -> list[str]:
    """Put adapters, which change nothing yet, at the places of a network that `module_filters` find.

    Linear layers, PyTorch's 2-D convolutions, and the layers of `modules.blocks` have places. Returns their names.

    Raises:
        LoraError: a filter finds nothing, or a weight does not have the rank.
    """
    try:
        with searching("module_filters"):
            lora.choose(list(places(network, settings.split_qkv)), filters)
        if settings.dora:
            load_deferred(network, "cpu")  # the lengths of its rows are where magnitudes begin
        return lora.add_adapters(network, filters, settings)
    except UserError:
        raise
    except ValueError as error:
        raise LoraError(f"module_filters, rank: {error}") from None


def adapters_of(network: nn.Module) -> dict[str, Adapter]:
    """The adapters in a network by the names of their places, as a file would hold them."""
    return {
        name: Adapter(a.down.detach(), a.up.detach(), a.settings.alpha,
                      None if a.magnitude is None else a.magnitude.detach(), a.settings.rank_stabilised)
        for name, _, a in adapters(network)
    }  # fmt: skip


@torch.no_grad()
def fill(adapter: LowRank, source: Adapter) -> None:
    """Start an adapter from one of a file: it changes the weight as that does, whatever the alphas of the two are.

    Raises ValueError where a tensor is of another shape.
    """
    for part in ("down", "up", "magnitude"):
        own, other = getattr(adapter, part), getattr(source, part)
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (other, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{part} is {shapes[0] or 'not'} in the file and {shapes[1] or 'not'} in this run")
        if own is not None:
            own.copy_(other)
    if source.scale != adapter.settings.scale:
        adapter.up.mul_(source.scale / adapter.settings.scale)


@torch.no_grad()
def merge_loras(network: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add the changes of LoRAs to the weights of a network, each times its strength; the network has no adapters."""
    there = places(network) | places(network, split_qkv=True)
    sources = [(split(source.adapters), strength) for source, strength in loras]
    for name in dict.fromkeys(name for own, _ in sources for name in own):
        weight = there[name].weight
        weight.add_(sum(_change(weight, own[name]) * strength for own, strength in sources if name in own))


def _change(weight: Tensor, source: Adapter) -> Tensor:
    if source.by_columns:
        matrices = (source.up.float() @ source.down.float().flatten(1)).view(weight.shape)
        changed = weight.float() + source.scale * matrices
        dims = [0, *range(2, weight.dim())]
        lengths = source.magnitude.view(1, -1, *[1] * (weight.dim() - 2))
        return changed * (lengths / torch.linalg.vector_norm(changed, dim=dims, keepdim=True)) - weight.float()
    settings = LoraSettings(source.rank, source.alpha, source.rank_stabilised, dora=source.magnitude is not None)
    adapter = LowRank(weight, settings)
    fill(adapter, source)
    return adapter.change(weight)


def listed_loras(files: Sequence[str], use_ema: bool = True) -> list[tuple[Path, float]]:
    """The paths and strengths of a list of LoRAs, each written as FILE[:STRENGTH].

    A FILE may be the folder of a training run, or a name of the hub; use_ema takes a run's averaged weights, where
    there are some.

    Raises:
        UserError: see `listed_weights`.
    """
    return [(listed_weights(place, "lora", use_ema), strength) for place, strength in map(parse_lora, files)]


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE[:STRENGTH]` -> the path and the strength, 1 without one.

    Raises:
        UserError: the strength is not finite.
    """
    path, colon, said = text.rpartition(":")
    try:
        strength = float(said) if colon else None
    except ValueError:
        strength = None  # a colon that belongs to the path
    if strength is None:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise UserError(f"lora: {text} is given with the strength {said}; write a number, such as 0.8")
    return Path(path), strength
