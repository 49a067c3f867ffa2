"""A GPU that is not there: code runs on shapes, with the devices that it would have, and must not wait for them.

PyTorch's fake tensors stand for those on the GPU; what is on the CPU is real, so that code can decide by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class Waits(AssertionError):
    """The GPU would have been waited for."""


class FakeGpu(TorchDispatchMode):
    """Inside, there is `cuda:0`, for tensors without values.

    What needs one of their values, or a shape that depends on them, is an exception of PyTorch's at any time; so is
    computing with tensors of two devices. Copies to the CPU are zeros; `watched` refuses those, and all that wait.
    """

    def __init__(self):
        super().__init__()
        self._fake, self._watched = FakeTensorMode(), False
        self._pinned: dict[int, Tensor] = {}  # by id; kept, so that no other tensor gets the id of one

    def __enter__(self) -> Self:
        self._swap, torch.utils.swap_tensors = torch.utils.swap_tensors, _swap
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)
        torch.utils.swap_tensors = self._swap

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what waits is an exception."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is aten.is_pinned.default:
            return id(args[0]) in self._pinned
        if function is aten._pin_memory.default:
            pinned = self._call(aten.clone.default, args[:1], {})
            self._pinned[id(pinned)] = pinned
            return pinned
        # The autograd engine would look for a GPU. Only PyTorch's C++ asks so, and is content with this device.
        if function is torch.ops.prim.device.default:
            return torch.device("meta")
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = GPU
        return self._call(function, args, kwargs)

    def _call(self, function, args: tuple, kwargs: dict):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        devices = {tensor.device.type for tensor in tensors} | ({target.type} if target is not None else set())
        if self._watched and "cuda" in devices:
            elsewhere = [tensor for tensor in tensors if tensor.device.type != "cuda"]
            self._check(function, args, kwargs, elsewhere, devices)
        if function is aten._to_copy.default and target == torch.device("cpu") and "cuda" in devices:
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if "cuda" in devices or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*tree_map_only(Tensor, _as_fake, args), **tree_map_only(Tensor, _as_fake, kwargs))
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    def _check(self, function, args: tuple, kwargs: dict, elsewhere: list[Tensor], devices: set[str]) -> None:
        if function in (aten._to_copy.default, aten.copy_.default):
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if "cpu" in devices and not (non_blocking and all(id(tensor) in self._pinned for tensor in elsewhere)):
                raise Waits(f"{function}: only a copy from pinned memory with non_blocking=True would not wait")
        elif function is aten.empty_like.default:
            return  # looks at no value
        elif any(tensor.dim() for tensor in elsewhere):  # of Python's lists, PyTorch makes tensors on `meta`
            raise Waits(f"{function}: tensors of the CPU, or lists, are copied first")
        elif function is aten.segment_reduce.default and not kwargs.get("unsafe"):
            raise Waits(f"{function}: looks at the lengths; write unsafe=True")


def _as_fake(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    device = GPU if tensor.is_meta else tensor.device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _swap(one: Tensor, other: Tensor) -> None:
    """What `Module.to` does with fake parameters, which PyTorch cannot swap."""
    assert one.shape == other.shape
    if (one.dtype, one.device) != (other.dtype, other.device):
        one.data, one.fake_device = other, other.fake_device
