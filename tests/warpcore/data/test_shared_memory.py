"""The memory of batches is used again, and never while somebody still holds what lies in it."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.warpcore.data.test_loader import micro_batches  # noqa: F401
from tests.warpcore.data.test_reader import TXT
from warpcore.data.loader import Loader
from warpcore.data.reader import Reader
from warpcore.data.shared_memory import PIECES, Lender, new_returns


@pytest.mark.parametrize("seed", range(20))
def test_no_two_batches_that_are_held_share_memory(seed):
    rng = np.random.default_rng(seed)
    returns = new_returns(2)
    lender, held = Lender(1, returns[1]), []
    for step in range(200):
        # At times there are more than the lender holds on to.
        while held and rng.random() < (0.3 if step % 80 < 40 else 0.6):
            memory, fill, loan = held.pop(int(rng.integers(len(held))))
            assert (memory == fill).all()
            returns[1, loan.piece] = loan.number
        memory = lender.lend(int(rng.integers(1, 5000)))
        memory.fill_(step % 256)
        held.append((memory, step % 256, lender.take_loan()))
    assert all((memory == fill).all() for memory, fill, _ in held)
    assert {loan.worker for *_, loan in held} == {1}


def test_what_came_back_is_lent_again_by_size():
    returns = new_returns(1)
    lender = Lender(0, returns[0])

    def place_of(num_bytes, *, comes_back=True):
        memory = lender.lend(num_bytes)
        assert (memory.dtype, memory.shape) == (torch.uint8, (num_bytes,))
        if comes_back:
            loan = lender.take_loan()
            returns[0, loan.piece] = loan.number
        return memory.data_ptr()

    first = place_of(1000)
    assert place_of(900) == place_of(1000) == first
    kept = place_of(1000, comes_back=False)
    assert lender.take_loan() is not None
    assert lender.take_loan() is None
    others = {place_of(1000) for _ in range(5)}
    assert len(others) == 1
    assert kept not in others


def segments(worker) -> set[str]:
    """The files of shared memory that a process has open in its address space."""
    lines = Path(f"/proc/{worker.pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[4] for line in lines if "/torch_" in line}


@pytest.mark.integration
def test_views_of_batches_stay_what_they_are_while_the_rest_is_used_again(micro_batches):  # noqa: F811
    expected = [batch.images[1] for batch in Loader(micro_batches, Reader(captions=TXT), num_workers=0)]
    with Loader(micro_batches, Reader(captions=TXT), num_workers=1) as loader:
        seen = set()
        for batch in loader:
            assert torch.equal(batch.images[1], expected[batch.number])
            seen |= segments(multiprocessing.active_children()[0])
        assert len(seen) <= PIECES + 1, "nearly every batch had memory of its own"
        del batch
        views = [batch.images[1] for batch in loader]
        assert len(views) > 2 * PIECES
        assert all(map(torch.equal, views, expected))
