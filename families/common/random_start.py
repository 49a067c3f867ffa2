"""Networks that start from random weights, without a file: large ones are never whole on a process.

A large network is built on the meta device and placed like one whose weights are in a file (`warpcore.loading`); only
then is it drawn, layer by layer, and each process keeps its rows. A layer's numbers follow from the seed and its name,
so that they are the same on any number of processes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from warpcore.loading import assign
from warpcore.random import stable_hash

Network = TypeVar("Network", bound=nn.Module)
Initialise = Callable[[str, nn.Module], None]
"""Gives the parameters of a layer, which may have any values, those of the start; takes its name too."""
DRAWN_WHOLE = 100_000_000
"""Networks of at most this many parameters are drawn whole, from one stream of random numbers: the minis, whose runs
repeat those of before."""


def random_start(build: Callable[[], Network], initialise: Initialise, dtype: torch.dtype) -> Network:
    """A network with random weights, which may wait until the network is where it lives.

    build: constructs it, on the default device.
    """
    with torch.device("meta"):
        network = build()
    if sum(parameter.numel() for parameter in network.parameters()) <= DRAWN_WHOLE:
        network = build()
        with torch.no_grad():
            for name, layer in network.named_modules():
                initialise(name, layer)
        return network
    assign(network, RandomWeights(network, initialise, torch.initial_seed()), dtype, deferrable=True)
    return network


class RandomWeights(Mapping[str, Tensor]):
    """The state of a network, float32 on the CPU: each tensor is drawn when it is asked for.

    network: on the meta device, and without buffers that are computed.
    """

    def __init__(self, network: nn.Module, initialise: Initialise, seed: int):
        self._initialise, self._seed = initialise, seed
        self._names = list(network.state_dict())
        owners = {name.rpartition(".")[0] for name in self._names}
        self._layers = {owner: copy.deepcopy(network.get_submodule(owner)) for owner in owners}
        self._drawn: tuple[str, nn.Module] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        if owner not in self._layers:
            raise KeyError(name)
        if self._drawn is None or self._drawn[0] != owner:
            self._drawn = None  # before the next one takes memory
            self._drawn = owner, self._draw(owner)
        return getattr(self._drawn[1], own).detach()

    @torch.no_grad()
    def _draw(self, owner: str) -> nn.Module:
        layer = copy.deepcopy(self._layers[owner]).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(stable_hash(self._seed, "random start", owner))
            self._initialise(owner, layer)
        return layer
