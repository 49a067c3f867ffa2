"""Tensors that may be sharded over processes (`DTensor`), or not."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, which shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it; where it is sharded, all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
