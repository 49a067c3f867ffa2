"""The levels of activation checkpointing that the benchmark measures each take less memory than the one before."""

import pytest
import torch

from benchmarks.checkpointing import measure
from benchmarks.plain_loops import FAMILIES, Case


@pytest.mark.slow
@pytest.mark.integration
def test_each_level_of_nova_takes_less_memory():
    found = measure(FAMILIES["nova"], Case("tiny", "mini", 64, 8, num_frames=1), torch.device("cpu"), turns=1)
    peaks = [peak for _, peak in found.values()]
    assert list(found) == [0, 1, 2, 3]
    assert peaks == sorted(set(peaks), reverse=True)
