"""LoRA on any network: adapters to train, and LoRAs of files merged into weights, several at once.

add_adapters       put adapters where `module_filters` find layers; then train them
adapters_of        what they are, to be written to a file (`families.common.lora_files`)
merge_loras        the changes of several files, each with its strength, added to the weights
draw_with          the same for drawing, where a change may follow the noise
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from families.common.lora_formats import Adapter, FactorAdapter, Lora, OneAdapter, split
from families.common.weight_source import listed_weights
from modules import lora
from modules.adapters import LoraSettings, WeightAdapter, change_of
from modules.lora import KINDS, adapters, places
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
            lora.choose(list(places(network, settings.parts_apart)), filters)
        if settings.dora:
            load_deferred(network, "cpu")  # the lengths of its rows are where magnitudes begin
        return lora.add_adapters(network, filters, settings)
    except UserError:
        raise
    except ValueError as error:
        raise LoraError(f"module_filters, rank: {error}") from None


def adapters_of(network: nn.Module) -> dict[str, OneAdapter]:
    """The adapters in a network by the names of their places, as a file would hold them."""
    return {name: _stored(adapter) for name, _, adapter in adapters(network)}


def _stored(adapter: WeightAdapter) -> OneAdapter:
    settings = adapter.settings
    tensors = {name: factor.detach() for name, factor in adapter.tensors.items()}
    magnitude = None if adapter.magnitude is None else adapter.magnitude.detach()
    if settings.kind == "lora":
        return Adapter(**tensors, alpha=settings.alpha, magnitude=magnitude, rank_stabilised=settings.rank_stabilised)
    if adapter.rank(tensors) is None:  # it counts as it is
        return FactorAdapter(settings.kind, tensors, settings.rank)
    return FactorAdapter(settings.kind, tensors, settings.alpha, rank_stabilised=settings.rank_stabilised)


@torch.no_grad()
def fill(adapter: WeightAdapter, source: OneAdapter) -> None:
    """Start an adapter from one of a file: it changes the weight as that does, whatever the alphas of the two are.

    Raises ValueError where it is of another kind, or a tensor is of another shape.
    """
    if source.kind != adapter.settings.kind:
        title = KINDS[adapter.settings.kind].title
        raise ValueError(f"it is a {source.title} in the file and a {title} in this run: write adapter: {source.kind}")
    mine = adapter.tensors | {"magnitude": adapter.magnitude}
    theirs = {**source.tensors, "magnitude": source.magnitude}
    for part in sorted(mine.keys() | theirs.keys()):
        own, other = mine.get(part), theirs.get(part)
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (other, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{part} is {shapes[0] or 'not'} in the file and {shapes[1] or 'not'} in this run")
        if own is not None:
            own.copy_(other)
    if source.scale != adapter.scale:
        name = next(name for name in adapter.multiplied if name in mine)
        mine[name].mul_(source.scale / adapter.scale)


@torch.no_grad()
def merge_loras(network: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add the changes of LoRAs to the weights of a network, each times its strength; the network has no adapters."""
    there = places(network) | places(network, split_qkv=True)
    sources = [(split(source.adapters), strength) for source, strength in loras]
    for name in dict.fromkeys(name for own, _ in sources for name in own):
        weight = there[name].weight
        found = [(own[name], strength) for own, strength in sources if name in own]
        weight.add_(sum(change_of(weight, one.product, one.magnitude) * strength for one, strength in found))


@torch.no_grad()
def draw_with(network: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Let a network draw with LoRAs, each times its strength: merged, or where the rank follows the noise, beside it
    (see `follow_noise`).

    Raises:
        LoraError: two LoRAs of the latter kind change the same layer.
    """
    merge_loras(network, [(own, strength) for own, strength in loras if own.min_rank is None])
    there, changed = places(network) | places(network, split_qkv=True), set()
    for own, strength in loras:
        for name, source in split(own.adapters).items() if own.min_rank is not None else ():
            if name in changed:
                raise LoraError(f"lora: two with min_rank change {name}: draw with one of them alone")
            changed.add(name)
            min_rank = min(own.min_rank, source.rank)
            settings = LoraSettings(source.rank, source.alpha, source.rank_stabilised, min_rank=min_rank)
            try:
                adapter = lora.add_adapter(name, there[name], settings)
            except ValueError as error:
                raise LoraError(f"lora: {error}") from None
            fill(adapter, source)
            adapter.up.mul_(strength)


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
