"""Random numbers belong to a sample and a purpose."""

import pytest
import torch

from tests.fake_gpu import GPU, FakeGpu
from warpcore.random import SampleRandom, stable_hash

SEEDS = [3, 2**62, 0]


def test_python_decides_by_the_numbers_that_the_gpu_gets():
    with FakeGpu() as gpu, gpu.watched():
        random = SampleRandom(SEEDS, GPU)
        assert random.uniform("timestep").device == random.normal("noise", 2, 4).device == GPU
        decided = random.on_cpu.uniform("caption dropout").tolist()
    assert decided == SampleRandom(SEEDS).uniform("caption dropout").tolist()
    first = torch.rand((), generator=torch.Generator().manual_seed(stable_hash(3, "caption dropout")))
    assert decided[0] == first


@pytest.mark.bits
def test_a_sample_draws_the_same_numbers_in_any_company():
    together = SampleRandom(SEEDS).normal("noise", 2, 4)
    assert together.shape == (3, 2, 4)
    for row, seed in zip(together, SEEDS, strict=True):
        assert torch.equal(SampleRandom([seed]).normal("noise", 2, 4)[0], row)
    assert not torch.equal(SampleRandom(SEEDS).normal("another", 2, 4), together)
