"""Layers that start from scratch: `start_from_scratch` gives parameters new values by name, in place of their file's.

    start_from_scratch:
      - {pattern: "conv_in.*"}
      - {pattern: "*.attn2.to_[qkv].weight", method: xavier_uniform}
      - {pattern: "*.attn2.to_out.*", method: zeros}

Patterns are those of `warpcore.parameter_groups`, and the first that matches a parameter counts. It happens once,
before the first update of a run: a run that is resumed has its own weights. Random numbers follow from the seed and
the name of a layer, so that they are the same ones on any number of processes.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from warpcore.errors import UserError
from warpcore.loading import own_rows
from warpcore.parameter_groups import NamePattern, group_of
from warpcore.random import stable_hash
from warpcore.sharded import local
from warpcore.text import counted

KEY = "start_from_scratch"


class Start(NamePattern):
    """An entry of `start_from_scratch`."""

    method: Literal["default", "xavier_uniform", "zeros"] = "default"
    """`default`: as the network begins without a file, where it says that (`warpcore.networks.Initialising`), else as
    PyTorch makes a layer of its kind. `xavier_uniform`: matrices and kernels (Glorot and Bengio,
    2010, equation 16); of vectors, weights (of norms) are 1 and biases 0. `zeros`."""


@dataclass(frozen=True)
class FreshLayer:
    """A layer, some of whose parameters get new values."""

    name: str
    """With that of its network."""
    shapes: nn.Module
    """Like the layer, alone, with parameters on the meta device."""
    starts: Mapping[str, Start]
    """What its parameters begin with, by their names in the layer."""
    initialise: Callable[[nn.Module], None] | None = None
    """What the network does with such a layer."""

    @torch.no_grad()
    def values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Names with their network, and whole tensors on the CPU. Raises UserError where nothing gives them values."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(stable_hash(seed, KEY, self.name))
            layer = _alone(self.shapes, "cpu")
            if any(start.method == "default" for start in self.starts.values()):
                if _has_default(layer):
                    layer.reset_parameters()
                if self.initialise is not None:
                    self.initialise(layer)
            for name, start in self.starts.items():
                parameter = layer.get_parameter(name)
                if start.method == "default" and not parameter.isfinite().all():
                    raise _without_default(start, self.name, name, layer)
                if start.method == "zeros" or (start.method == "xavier_uniform" and name == "bias"):
                    nn.init.zeros_(parameter)
                elif start.method == "xavier_uniform" and parameter.dim() < 2:
                    nn.init.ones_(parameter)
                elif start.method == "xavier_uniform":
                    nn.init.xavier_uniform_(parameter)
                yield f"{self.name}.{name}", parameter.detach()


def fresh_layers(networks: Mapping[str, nn.Module], starts: Sequence[Start]) -> list[FreshLayer]:
    """The layers of the trained `networks` that start from scratch; called before the networks are placed.

    Raises:
        UserError: a pattern matches no parameter, or one that is frozen; or a method does not fit a layer.
    """
    parameters = {
        f"{network}.{name}": p for network, module in networks.items() for name, p in module.named_parameters()
    }
    chosen: dict[str, dict[str, Start]] = {}
    for name, start in group_of(parameters, starts, KEY).items():
        if start is not None and not parameters[name].requires_grad:
            raise UserError(
                f"{KEY}: {start.pattern!r} matches {name}, which is frozen and would stay as it begins: narrow the "
                "pattern, or train it (parameter_groups)"
            )
        if start is not None:
            owner, _, own = name.rpartition(".")
            chosen.setdefault(owner, {})[own] = start
    layers = []
    for owner, starts_of in chosen.items():
        network, _, path = owner.partition(".")
        layer = networks[network].get_submodule(path)
        for name, start in starts_of.items():
            _check(layer, owner, name, start)
        own = getattr(networks[network], "initialise_layer", None)
        initialise = own and partial(own, path)
        for name, start in starts_of.items():
            if start.method == "default" and initialise is None and not _has_default(layer):
                raise _without_default(start, owner, name, layer)
        layers.append(FreshLayer(owner, _alone(layer, "meta"), starts_of, initialise))
    return layers


def _check(layer: nn.Module, owner: str, name: str, start: Start) -> None:
    kind = type(layer).__name__
    if start.method == "xavier_uniform" and layer.get_parameter(name).dim() < 2 and name not in ("weight", "bias"):
        raise UserError(
            f"{KEY}: {start.pattern!r} matches {owner}.{name}, a vector of a {kind} that is neither the weight of a "
            "norm nor a bias: write method: zeros for it"
        )


def _has_default(layer: nn.Module) -> bool:
    """Whether PyTorch has one for layers of a kind, and nothing else has a part in it."""
    return hasattr(layer, "reset_parameters") and not len(list(layer.children()))


def _without_default(start: Start, owner: str, name: str, layer: nn.Module) -> UserError:
    return UserError(
        f"{KEY}: {start.pattern!r} matches {owner}.{name}, and PyTorch has no default for a {type(layer).__name__}: "
        "write method: xavier_uniform or zeros for it"
    )


def _alone(layer: nn.Module, device: str) -> nn.Module:
    """A layer of the same shapes on a device, without values and without the layers in it."""
    alone = copy.copy(layer)
    alone._modules = {}
    for kind, make in (("_parameters", nn.Parameter), ("_buffers", lambda tensor: tensor)):
        made = {
            name: None if one is None else make(_undefined(one, device)) for name, one in vars(layer)[kind].items()
        }
        setattr(alone, kind, made)
    return alone


def _undefined(like: Tensor, device: str) -> Tensor:
    """Not numbers, so that it is seen where nothing gives them values."""
    return torch.full(like.shape, math.nan if like.is_floating_point() else 0, dtype=like.dtype, device=device)


@torch.no_grad()
def start_layers(layers: Sequence[FreshLayer], parameters: Mapping[str, Tensor], seed: int) -> None:
    """Give parameters, where they live by now, what `layers` begin with; of sharded ones, each process its rows."""
    for layer in layers:
        for name, whole in layer.values(seed):
            if not parameters[name].is_meta:  # where memory is counted, there are no values
                local(parameters[name]).copy_(own_rows(parameters[name], whole))


def what_starts(layers: Sequence[FreshLayer]) -> list[str]:
    """A line for each pattern: how many tensors and parameters start from scratch."""
    counts: dict[Start, list[int]] = {}
    for layer in layers:
        for name, start in layer.starts.items():
            counts.setdefault(start, []).append(layer.shapes.get_parameter(name).numel())
    return [
        f"{KEY}: {counted(len(sizes), 'tensor')}, {sum(sizes):,} parameters ({start.pattern}, {start.method})"
        for start, sizes in counts.items()
    ]
