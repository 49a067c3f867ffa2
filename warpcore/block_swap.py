"""Block swap: blocks of a frozen base wait in the CPU's memory, and are copied to the device ahead of their turn.

    the device computes   | block 3              | block 4              | block 5
    a copy travels        | block 4 ->           | block 5 ->           | block 6 ->
    memory is given up    | of block 2           | of block 3           | of block 4

Frozen weights never change, so copies go one way, and are dropped after use. At most two swapped blocks are on the
device: the one that computes, and the next one. (Others of this name, such as musubi-tuner's, exchange weights
instead, both ways.)

A swapped block has to compute again in the backward pass (`block.checkpointed`), where it is fetched once more;
otherwise the graph of the forward pass would keep its copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from warpcore.errors import UserError
from warpcore.loading import load_deferred
from warpcore.networks import blocks
from warpcore.offload import Waiting
from warpcore.statistics import has_batch_norms

CONTEXT = 4
"""Blocks by which the next one is known: enough to tell forward from backward where blocks run more than once."""


def swappable(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network that have frozen weights and a `compute`, which their checkpointing calls again."""
    return [
        block
        for block in blocks(network)
        if hasattr(block, "compute") and not all(parameter.requires_grad for parameter in block.parameters())
    ]


@dataclass(frozen=True)
class _Copies:
    """Copies of a block's weights, and what tells when they are complete; None where copying is not apart."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Let what the device computes from now on see them whole. Python does not wait."""
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)


class BlockSwap:
    """Brings a network to a device, but for the frozen weights of some blocks, spread evenly over it, which wait.

    Which block comes next is learned: the one that came when the same had computed before it. So forward passes,
    backward passes in reverse order, sampling, and blocks that run twice need no plan. A wrong guess costs a copy.
    """

    def __init__(self, network: nn.Module, count: int, device: torch.device):
        """
        Args:
            count: how many blocks wait; trained weights in them (adapters) are on the device.

        Raises:
            UserError: the network has not as many blocks with frozen weights.
        """
        able = swappable(network)
        if count > len(able):
            raise UserError(
                f"swap_blocks: {count} blocks cannot wait, as {type(network).__name__} has {len(able)} with frozen "
                "weights: write no more than those"
            )
        chosen = evenly(able, count)
        if any(map(has_batch_norms, chosen)):
            raise UserError("swap_blocks: batch norms count, which copies would forget: remove the key")
        load_deferred(network, "cpu")
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks = [Waiting(block.modules(), device, buffers=False) for block in chosen]
        network.to(device)  # all but what waits, in whose places there is nothing at this moment
        self.nbytes = sum(block.nbytes for block in self._blocks)
        self._ahead: dict[int, _Copies] = {}  # of one block at most
        self._last: tuple[int, ...] = ()  # the blocks that computed last, CONTEXT at most
        self._next: dict[tuple[int, ...], int] = {}  # which one came after those
        for number, (block, waiting) in enumerate(zip(chosen, self._blocks, strict=True)):
            waiting.put_home()
            block.compute = self._bringing(number, block.compute)

    def forget(self) -> None:
        """Give up what was copied ahead, which is on the device between two updates."""
        for copies in self._ahead.values():
            copies.wait()  # memory is given away in the order of what computes: not before the copy is complete
        self._ahead.clear()

    def _bringing(self, number: int, compute: Callable) -> Callable:
        block = self._blocks[number]

        @wraps(compute)
        def call(*inputs: Any, **named: Any) -> Any:
            block.put(self._fetched(number))
            try:
                return compute(*inputs, **named)
            finally:
                block.put_home()  # of the copies, the backward pass keeps what it needs until it has used it

        return call

    def _fetched(self, number: int) -> list[Tensor]:
        """The weights of a block on the device; those of the next block are on their way from now on."""
        copies = self._ahead.pop(number, None)
        self.forget()
        copies = copies or self._sent(number)
        copies.wait()
        self._next[self._last] = number
        self._last = (*self._last[1 - CONTEXT :], number)
        following = self._next.get(self._last)
        if following is not None:  # the last block of a forward pass is the first of the backward pass: it stays
            self._ahead[following] = copies if following == number else self._sent(following)
        return copies.tensors

    def _sent(self, number: int) -> _Copies:
        block = self._blocks[number]
        if self._stream is None:
            return _Copies(block.copies())
        # The memory belongs to the stream that computes, which may have work left for whoever had it before; and it
        # waits for the copy before the memory can be someone else's. So none of it has to be recorded elsewhere.
        room = block.empty()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return _Copies(block.fill(room), self._stream.record_event())


def evenly(of: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """As many, spread evenly, so that what lies between two of them computes while the second travels; the last one
    is among them."""
    return [of[(number + 1) * len(of) // count - 1] for number in range(count)]
