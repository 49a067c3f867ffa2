"""The memory that a LoRA's update takes, counted on the meta device and compared with what is known."""

import pytest
import torch

from benchmarks.lora import GIB, PeakMemory, count_nf4, count_others, count_update
from tests.golden import load_manifest


def test_the_counter_sees_what_lives_and_what_is_freed():
    x = torch.ones(1000, requires_grad=True)
    with PeakMemory([x]) as memory:
        y = x * 2 + 1  # the product is freed at once
        assert (memory.alive, memory.peak) == (4000, 8000)
        z = y.view(10, 100).exp()
        del y
        assert memory.alive == 4000
        z.sum().backward()
        del z
        x.grad = None
    assert memory.alive == 0
    assert memory.peak == 12_008  # z, its gradient and that of x; the sum and its gradient


@pytest.mark.slow
def test_the_3_6B_fits_in_12_gb_and_with_batch_4_in_16():
    others = sum(count_others().values())
    for batch, limit in ((1, 12), (4, 16)):
        parts = count_update("3.6B", batch, checkpointing=3)
        assert parts["Stage C, frozen"] == 2 * 3_589_103_632
        assert parts["adapters and two moments"] == 3 * 4 * 3_145_728
        assert sum(parts.values()) + others < 0.9 * limit * GIB
    assert count_nf4("3.6B") < 0.27 * 2 * 3_589_103_632


@pytest.mark.integration
@pytest.mark.parametrize("positions", [8, 16])
def test_checkpointing_keeps_only_the_inputs_of_blocks(positions):
    """1B: 2 + 2 levels of 4 and 12 times three blocks; each input is a map of 1536 channels in bfloat16."""
    blocks = sum(map(sum, load_manifest("stage_c_1B")["constructor"]["blocks"])) * 3
    inputs = blocks * positions**2 * 1536 * 2
    counted = count_update("1B", 1, 3, positions)["activations and gradients"]
    everything = count_update("1B", 1, 0, positions)["activations and gradients"]
    assert inputs < counted < 0.6 * everything
