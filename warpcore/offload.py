"""What waits in the CPU's memory until the device needs it: frozen networks, and the inputs of checkpointed blocks.

Copies go through pinned memory and run in the order of the device's other work, so nothing here waits for them.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from warpcore.networks import blocks, forward_methods
from warpcore.sharded import stored_bytes


class OnDemand:
    """Keeps a frozen network in the CPU's memory, and on the device only while it is called.

    A network whose output needs gradients stays on the device from then on, as the backward pass needs its weights.
    A call is one of `forward`, or of a method that the network lists in `forward_methods`.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.device, self.stays = device, False
        self._calls = 0
        tables = [table for module in network.modules() for table in (module._parameters, module._buffers)]
        self._slots = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        self._home = [table[name].detach().cpu() for table, name in self._slots]
        if device.type == "cuda":
            self._home = [tensor.pin_memory() for tensor in self._home]
        self.nbytes = sum(map(stored_bytes, self._home))
        self._put(self._home)
        for name in ("forward", *forward_methods(network)):
            setattr(network, name, self._bringing(getattr(network, name)))

    def _bringing(self, method: Callable) -> Callable:
        @wraps(method)
        def call(*args, **kwargs):
            if self._calls == 0 and not self.stays:
                self._put([_copy_on(self.device, tensor) for tensor in self._home])
            self._calls += 1
            try:
                result = method(*args, **kwargs)
                self.stays |= any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(result))
                return result
            finally:
                self._calls -= 1
                if self.stays:
                    self._home = []
                elif self._calls == 0:
                    self._put(self._home)

        return call

    def _put(self, tensors: list[Tensor]) -> None:
        for (table, name), tensor in zip(self._slots, tensors, strict=True):
            was_parameter = isinstance(table[name], nn.Parameter)
            table[name] = nn.Parameter(tensor, requires_grad=False) if was_parameter else tensor


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


def _copy_on(device: torch.device, kept: Tensor) -> Tensor:
    tensor = torch.empty_like(kept, device=device)
    tensor.copy_(kept, non_blocking=True)
    return tensor
