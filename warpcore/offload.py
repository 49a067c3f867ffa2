"""What waits in the CPU's memory until the device needs it: frozen networks, and the inputs of checkpointed blocks.

Copies go through pinned memory and run in the order of the device's other work, so nothing here waits for them.
"""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from warpcore.networks import blocks, forward_methods
from warpcore.sharded import plain_parts, stored_bytes


class Waiting:
    """The frozen tensors of modules, in the CPU's memory: pinned, where the device is a GPU. Trained ones stay.

    Those in the modules are exchanged: for copies on the device, and for those of the CPU again.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, buffers: bool = True):
        """
        Args:
            buffers: whether these wait, too; those of a network that is trained are part of its state.
        """
        self.device = device
        kinds = ("_parameters", "_buffers") if buffers else ("_parameters",)
        tables = [getattr(module, kind) for module in modules for kind in kinds]
        frozen = [(t, name) for t in tables for name, x in t.items() if x is not None and not x.requires_grad]
        self._slots: list[tuple[dict, str, bool]] = []
        self._home: list[Tensor] = []
        for table, name in frozen:
            self._slots.append((table, name, isinstance(table[name], nn.Parameter)))
            home = table[name].detach().cpu()
            self._home.append(home.pin_memory() if device.type == "cuda" else home)
            table[name] = None  # so that memory holds no more than one tensor twice
        self.nbytes = sum(map(stored_bytes, self._home))

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Let the modules have these tensors, which are in the order of `empty`."""
        for (table, name, is_parameter), tensor in zip(self._slots, tensors, strict=True):
            table[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def put_home(self) -> None:
        """Let the modules have those in the CPU's memory."""
        self.put(self._home)

    def copies(self) -> list[Tensor]:
        """Copies on the device."""
        return self.fill(self.empty())

    def empty(self) -> list[Tensor]:
        """Room on the device for a copy of each tensor."""
        return [_room(self.device, tensor) for tensor in self._home]

    def fill(self, room: list[Tensor]) -> list[Tensor]:
        """Copy the values into what `empty` gave, in the order of the device's work; the same tensors."""
        for tensor, home in zip(room, self._home, strict=True):
            for part, of_home in zip(plain_parts(tensor), plain_parts(home), strict=True):
                part.copy_(of_home, non_blocking=True)
        return room


class OnDemand:
    """Keeps a frozen network in the CPU's memory, and on the device only while it is called.

    A network whose output needs gradients stays on the device from then on, as the backward pass needs its weights.
    A call is one of `forward`, or of a method that the network lists in `forward_methods`.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.stays = False
        self._calls = 0
        self._waiting = Waiting(network.modules(), device)
        self._waiting.put_home()
        self.nbytes = self._waiting.nbytes
        for name in ("forward", *forward_methods(network)):
            setattr(network, name, self._bringing(getattr(network, name)))

    def _bringing(self, method: Callable) -> Callable:
        @wraps(method)
        def call(*args, **kwargs):
            if self._calls == 0 and not self.stays:
                self._waiting.put(self._waiting.copies())
            self._calls += 1
            try:
                result = method(*args, **kwargs)
                self.stays |= any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(result))
                return result
            finally:
                self._calls -= 1
                if self.stays:
                    self._waiting = None
                elif self._calls == 0:
                    self._waiting.put_home()

        return call


def keep_inputs_on_cpu(network: nn.Module) -> None:
    """Let what a network's checkpointed blocks compute on wait in the CPU's memory for the backward pass.

    That is the first input of a block, and all that grows with the number of blocks: other inputs are shared by many.
    """
    for block in blocks(network):
        block.forward = _sending(block)


def _sending(block: nn.Module) -> Callable:
    forward = block.forward

    @wraps(forward)
    def send(*inputs: Any, **named: Any) -> Any:
        if not block.checkpointed:
            return forward(*inputs, **named)
        x = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
        # The graph keeps these functions, which must not keep x.
        pack = partial(_pack, x.untyped_storage()._cdata)
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return forward(*inputs, **named)

    return send


def _pack(storage: int, saved: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    if saved.untyped_storage()._cdata != storage:
        return saved
    kept = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
    kept.copy_(saved, non_blocking=True)
    return kept, saved.device


def _unpack(packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    return packed if isinstance(packed, Tensor) else _copy_on(packed[1], packed[0])


def _room(device: torch.device, tensor: Tensor) -> Tensor:
    """Of packed tensors with their values: torchao's `empty_like` leaves some parts of NF4 where they are."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return torch.empty_like(tensor, device=device)
    return tensor.clone() if tensor.device == device else tensor.to(device, non_blocking=True)


def _copy_on(device: torch.device, kept: Tensor) -> Tensor:
    tensor = torch.empty_like(kept, device=device)
    tensor.copy_(kept, non_blocking=True)
    return tensor
