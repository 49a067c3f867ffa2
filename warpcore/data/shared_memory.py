"""The memory through which data workers hand their batches over.

A worker fills the same memory again once nobody holds the batch that lay in it: making new shared memory costs the
system more time per picture than copying the picture there.
"""

import errno
import os
import shutil
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from warpcore.errors import UserError

SHARED_MEMORY = "/dev/shm"
PIECES = 8
"""Of memory that a worker holds on to at most. It makes as many as there are batches of it at one time."""


class Loan(NamedTuple):
    """The piece of a worker's memory that a batch lies in."""

    worker: int
    piece: int
    number: int


class Lender:
    """A worker's pieces of shared memory.

    returned: int64 (PIECES,), shared with the main process: the number of the last loan of each piece that came back.
    """

    def __init__(self, worker: int, returned: Tensor):
        self._worker, self._returned = worker, returned.numpy()
        self._pieces: list[torch.UntypedStorage | None] = [None] * PIECES
        self._lent = [0] * PIECES
        self._last: Loan | None = None

    def lend(self, num_bytes: int) -> Tensor:
        """uint8 (num_bytes,): the smallest free piece that is large enough, else a new one in the place of a smaller
        one. Where none is free, the piece that was lent first is left to its batch."""
        sizes = [0 if piece is None else piece.nbytes() for piece in self._pieces]
        free = [place for place in range(PIECES) if self._returned[place] == self._lent[place]]
        large = [place for place in free if sizes[place] >= num_bytes]
        if large:
            place = min(large, key=sizes.__getitem__)
        else:
            place = max(free, key=sizes.__getitem__) if free else self._lent.index(min(self._lent))
            self._pieces[place] = None  # its memory goes before the new one comes
            self._pieces[place] = torch.UntypedStorage._new_shared(num_bytes)
        number = max(self._lent) + 1
        self._lent[place], self._last = number, Loan(self._worker, place, number)
        return torch.empty(0, dtype=torch.uint8).set_(self._pieces[place], 0, (num_bytes,))

    def take_loan(self) -> Loan | None:
        """The loan since this was last asked for, if there was one."""
        loan, self._last = self._last, None
        return loan


lender: Lender | None = None
"""Of this process, which is a worker of the loader."""


def new_bytes(number: int) -> Tensor:
    """uint8 (number,), not filled: in a worker of the loader shared memory, which spares a copy at the hand-over."""
    return torch.empty(number, dtype=torch.uint8) if lender is None else lender.lend(number)


def new_returns(num_workers: int) -> Tensor:
    """int64 (num_workers, PIECES), shared: what each `Lender` reads of what came back. Raises UserError where
    shared memory is full."""
    try:
        return torch.zeros((num_workers, PIECES), dtype=torch.int64).share_memory_()
    except RuntimeError as error:
        if is_full(error):
            raise UserError(full_message()) from error
        raise


def return_when_free(tensor: Tensor, loan: Loan, returns: Tensor) -> None:
    """Tell the worker, once neither `tensor` nor any view of its memory is left in this process."""
    row = returns[loan.worker].numpy()
    weakref.finalize(tensor.untyped_storage(), row.__setitem__, loan.piece, loan.number).atexit = False


def is_full(error: Exception) -> bool:
    """Whether it was raised by PyTorch, which makes shared memory for a batch, or by the semaphores of a queue.

    Both read as a full disk, though no disk has anything to do with it: they name no file on one.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.filename is None
    return isinstance(error, RuntimeError) and "shared memory" in str(error) and "No space left" in str(error)


def full_message() -> str:
    usage = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    room = f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)" if usage else ""
    return (
        f"the shared memory {SHARED_MEMORY}, through which data workers hand their batches over, is full{room}; no "
        "disk is. Give it more room (docker run --shm-size=8g), lower num_workers or the micro-batch size, or write "
        "num_workers: 0, which needs none of it"
    )
