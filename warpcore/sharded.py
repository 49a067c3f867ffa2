"""Tensors that may be sharded over processes (`DTensor`), packed into fewer bits (such as NF4), or neither."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, such as rows (n / processes, ...) of (n, ...); it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, in the shape that it says; where it is sharded, all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(values: Tensor, parameter: Tensor) -> Tensor:
    """The sum of each value (any shape) over the processes that share a parameter; all of them have to call this.

    It is where the values are, which of offloaded parameters is not the device of their mesh.
    """
    if not isinstance(parameter, DTensor):
        return values
    total = values.clone()
    for number, place in enumerate(parameter.placements):
        if place.is_shard():  # replicas have equal numbers, shards their own parts
            dist.all_reduce(total, group=parameter.device_mesh.get_group(number))
    return total


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor in this process: itself, or those that it is packed into."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # a DTensor names its mesh, too
            yield from plain_parts(part)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in this process; `nbytes` of a packed one is what it would take unpacked."""
    return sum(part.nbytes for part in plain_parts(tensor))
