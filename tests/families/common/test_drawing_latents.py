"""Latents are drawn along the times that a sampler is published with, which the network is told."""

import pytest
import torch
from torch import Tensor, nn

from families.common.sampling import check_sampling, draw_latents
from warpcore.diffusion.processes import discrete_process
from warpcore.errors import UserError


class Recorder(nn.Module):
    """Predicts noise, and variances in between; remembers the times that it was told."""

    def __init__(self):
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.told.append(t[0].item())
        return torch.cat([self.scale * x, torch.zeros_like(x)], dim=1)


def drawn(sampler: str, seeds: list[int], steps: int = 4, **settings) -> tuple[Tensor, list[float]]:
    network, process = Recorder(), discrete_process("linear", learned_variance=True)
    sampling = {"steps": steps, "guidance": None, "sampler": sampler} | settings
    return draw_latents(process, network, {}, None, (2, 3, 3), seeds, **sampling), network.told


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ("iddpm", [999, 666, 333, 0]),
        ("ddim", [750, 500, 250, 0]),
        ("dpm-solver", [999, 749.25, 499.5, 249.75]),
    ],
)
def test_the_network_is_told_the_published_times(sampler, told):
    assert drawn(sampler, [0])[1] == pytest.approx(told, abs=1e-3)


@pytest.mark.parametrize("sampler", ["iddpm", "dpm-solver"])
def test_a_seed_gives_the_same_latents_in_any_batch(sampler):
    both, _ = drawn(sampler, [3, 7])
    alone, _ = drawn(sampler, [7])
    torch.testing.assert_close(both[1:], alone)
    assert both.isfinite().all()
    assert not torch.allclose(both[0], both[1])


def test_a_part_of_the_steps_begins_at_given_latents():
    start = torch.ones(1, 2, 3, 3)
    _, told = drawn("iddpm", [0], start=start, noise_level=0.5)
    assert told == [333, 0]


def test_what_a_sampler_cannot_do_is_refused_before_a_run():
    check_sampling(discrete_process("linear", learned_variance=True), 1000, "iddpm")
    with pytest.raises(UserError, match="sampler: iddpm needs a network that learns the variance of steps"):
        check_sampling(discrete_process("linear"), 20, "iddpm")
    with pytest.raises(UserError, match="1001 of 1000 timesteps"):
        check_sampling(discrete_process("linear", learned_variance=True), 1001, "iddpm")
