"""Weights that are read where they will be: a network is built without values, placed, and filled tensor by tensor.

    with deferring():                       # the engine, around a script's `build`
        network = ...                       # on the meta device: shapes, no memory
        assign(network, tensors)            # its builder: the tensors of its file, mapped into memory
    fully_shard(network)                    # the engine: still shapes alone
    load_deferred(network, device)          # each process reads the rows that it keeps, in the dtype that they have

So a network may be larger than the memory of a machine. Outside of `deferring`, `assign` gives the tensors at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from warpcore.sharded import local

_DEFERRING = ContextVar("deferring", default=False)
_WAITING = "_deferred_weights"
"""The attribute of a network that waits for `load_deferred`: the tensors of its file, by name."""


@contextmanager
def deferring() -> Iterator[None]:
    """Inside, `assign` only notes which tensors a network will have."""
    before = _DEFERRING.set(True)
    try:
        yield
    finally:
        _DEFERRING.reset(before)


def assign(network: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, deferrable: bool = False) -> None:
    """Give a network on the meta device its state, floating-point numbers in `dtype`; names and shapes are checked.

    tensors: may be made only when they are asked for; in their order, each once.
    deferrable: nothing needs its values before the engine has placed it, so that they may wait for it.
    """
    if deferrable and _DEFERRING.get():
        nn.Module.to(network, dtype)  # not its own, which may warn
        setattr(network, _WAITING, tensors)
        return
    converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    network.load_state_dict(converted, strict=True, assign=True)


@torch.no_grad()
def load_deferred(network: nn.Module, device: torch.device | str) -> None:
    """Read what a network, or a part of it, waits for to a device: of sharded tensors, the rows of this process.

    Beside what stays, memory holds one tensor at a time. Tensors that have values already stay as they are.
    """
    for part in network.modules():
        waiting: Mapping[str, Tensor] = part.__dict__.pop(_WAITING, {})
        made: dict[int, Tensor] = {}  # a tensor that has two names stays one
        for name, stored in waiting.items():
            owner, _, own = name.rpartition(".")
            layer = part.get_submodule(owner)
            table = layer._parameters if own in layer._parameters else layer._buffers
            shape = table[own]
            if id(shape) not in made:
                values = _values(shape, stored, device)
                is_parameter = isinstance(shape, nn.Parameter)
                made[id(shape)] = nn.Parameter(values, requires_grad=shape.requires_grad) if is_parameter else values
            table[own] = made[id(shape)]


def _values(shape: Tensor, stored: Tensor, device: torch.device | str) -> Tensor:
    """Like a tensor of the meta device, with the values of a file."""
    if not isinstance(shape, DTensor) and shape.stride() == stored.stride():
        return stored.to(device, shape.dtype)  # on the CPU, in the same dtype, what is mapped is not copied
    values = torch.empty_like(shape.detach(), device=device)
    local(values).copy_(own_rows(shape, stored))
    return values


def own_rows(like: Tensor, whole: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that is sharded as `like` is; all of it where that is not sharded.

    Both have the same shape, of the whole tensor; the rows share memory with it.
    """
    if not isinstance(like, DTensor):
        return whole
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
