"""T-LoRA: the formula in whole numbers, adapters cut by hand, gradients, and what computes activations again."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from families.common.lora import LoraError, adapters_of, draw_with, merge_loras
from families.common.lora_formats import Adapter, Lora
from modules.lora import LoraSettings, adapters, add_adapters, merge
from modules.rank_by_noise import follow_noise, ranks_at
from tests.modules.test_lora import INPUTS, every_kind, randomised
from warpcore.diffusion.noise_conditions import CosineTNoiseCond, EDMNoiseCond, RectifiedFlowsNoiseCond
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.schedules import CosineSchedule

LEVELS = torch.tensor([0.25, 0.9])
VARIANTS = {"plain": {}, "split": {"split_qkv": True}, "stabilised": {"rank_stabilised": True}}


class Timed(nn.Module):
    """Layers of every kind, which are called as denoisers are; `again` computes all activations twice."""

    def __init__(self, again: bool = False):
        super().__init__()
        self.inner, self.again = every_kind(), again

    def forward(self, x, r, tokens):
        return checkpoint(self.inner, x, tokens, use_reentrant=False) if self.again else self.inner(x, tokens)


def following(rank: int = 7, min_rank: int = 2, *, again: bool = False, **settings) -> Timed:
    network = Timed(again).requires_grad_(False)
    add_adapters(network, ["."], LoraSettings(rank=rank, alpha=3, min_rank=min_rank, **settings))
    follow_noise(network, lambda r: r)
    return randomised(network)


def predicted(network: nn.Module, levels: torch.Tensor = LEVELS) -> torch.Tensor:
    return network(INPUTS[0], levels, INPUTS[1])


@pytest.mark.parametrize(("rank", "min_rank"), [(64, 32), (16, 1), (8, 3), (5, 4), (320, 1)])
def test_the_rank_at_every_timestep_is_the_published_formula(rank, min_rank):
    timesteps = torch.arange(1000)
    found = ranks_at(discrete_process().noise_cond.level(timesteps), rank, min_rank)
    assert found.tolist() == [(rank - min_rank) * (1000 - t) // 1000 + min_rank for t in range(1000)]
    assert ranks_at(torch.tensor([0.0, 1.0]), rank, min_rank).tolist() == [rank, min_rank]


def test_levels_are_what_the_network_is_told_with_the_shift_of_a_flow():
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    one = torch.zeros(5, 1)
    shifted, plain = flow_process(shift=3.0), flow_process(steps=1)
    for process, extra, expected in ((shifted, 1.0, 3 * t / (1 + 2 * t)), (plain, 2.0, 2 * t / (1 + t))):
        told = process.diffuse(one, one, t=t, shift=extra).noise_cond
        torch.testing.assert_close(process.noise_cond.level(told), expected)
    told = discrete_process(target="v").diffuse(one[:2], one[:2], t=torch.tensor([0, 750])).noise_cond
    assert discrete_process().noise_cond.level(told).tolist() == [0, 0.75]
    cosine, straight = CosineTNoiseCond(), RectifiedFlowsNoiseCond()
    torch.testing.assert_close(cosine.level(cosine(CosineSchedule()(t[1:4]))), t[1:4], rtol=0, atol=1e-3)
    torch.testing.assert_close(straight.level(straight(2 * ((1 - t) / t).log())), t)
    with pytest.raises(ValueError, match="EDMNoiseCond is no position"):
        EDMNoiseCond().level(t)


def cut(network: nn.Module, level: float) -> Lora:
    """The adapters of a network with the first columns alone that count at a level."""
    kept = int((7 - 2) * (1 - level)) + 2
    cut_off = {}
    for name, adapter in adapters_of(network).items():
        up = adapter.up.clone()
        up[:, kept:] = 0
        cut_off[name] = Adapter(adapter.down, up, adapter.alpha, rank_stabilised=adapter.rank_stabilised)
    return Lora(cut_off)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_sample_is_changed_as_if_merged_with_the_columns_that_its_noise_leaves(variant):
    network = following(**VARIANTS[variant])
    outputs = predicted(network)
    for i, level in enumerate(LEVELS.tolist()):
        merged = Timed()
        merge_loras(merged, [(cut(network, level), 1.0)])
        torch.testing.assert_close(outputs[i], predicted(merged)[i], rtol=1e-4, atol=1e-4)
    whole = predicted(following(min_rank=6, **VARIANTS[variant]))
    assert (outputs - whole).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_columns_that_no_sample_keeps_have_no_gradient():
    network = following()
    predicted(network).square().mean().backward()
    most = int(5 * (1 - 0.25)) + 2
    for name, _, adapter in adapters(network):
        assert not adapter.up.grad[:, most:].any(), name
        assert not adapter.down.grad[most:].any(), name
        assert (adapter.up.grad[:, :most].abs().amax(0) > 0).all(), name
        assert (adapter.down.grad[:most].flatten(1).abs().amax(1) > 0).all(), name


def test_activations_that_are_computed_again_have_the_same_ranks():
    gradients = []
    for again in (False, True):
        network = following(again=again)
        predicted(network, LEVELS.flip(0))  # the one before has other levels
        predicted(network).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)
    assert len(gradients[0]) == 14


@pytest.mark.filterwarnings("error:Dynamo")
def test_compiled_code_is_one_graph_for_all_levels():
    plain, compiled, graphs = following(), following(), []
    compiled.inner.compile(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for levels in (LEVELS, LEVELS.flip(0)):
        torch.testing.assert_close(predicted(compiled, levels), predicted(plain, levels))
    assert len(graphs) == 1


def test_parts_of_samples_have_the_rank_of_theirs_and_what_all_share_is_refused():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x, r, shared=False):
            return self.layer(x[0] if shared else x.flatten(0, 1))

    network, x = Frames(), torch.randn(2, 3, 5, 12)
    add_adapters(network, ["layer"], LoraSettings(rank=6, alpha=6, min_rank=1))
    follow_noise(network, lambda r: r)
    randomised(network)
    together = network(x, LEVELS).unflatten(0, (2, 3))
    for i in range(2):
        torch.testing.assert_close(together[i], network(x[i : i + 1], LEVELS[i : i + 1]))
    with pytest.raises(ValueError, match=r"min_rank: a layer of \(12, 12\) works on all samples at once"):
        network(x, LEVELS, shared=True)


def test_it_is_not_merged_and_not_computed_without_a_level():
    network = Timed()
    add_adapters(network, ["."], LoraSettings(rank=4, alpha=4, min_rank=1))
    with pytest.raises(RuntimeError, match="follows the noise"):
        predicted(network)
    with pytest.raises(TypeError, match="cannot be merged"):
        merge(network)


@torch.no_grad()
def test_drawing_has_the_ranks_of_training_beside_merged_loras():
    trained, other = following(), Timed()
    add_adapters(other, ["pointwise"], LoraSettings(rank=2, alpha=2))
    merged = adapters_of(randomised(other, 5))
    network, expected = Timed(), following()
    own = Lora(adapters_of(trained), min_rank=2)
    draw_with(network, [(own, 0.5), (Lora(merged), 2.0)])
    with follow_noise(network, lambda r: r):
        found = predicted(network)
    for _, _, adapter in adapters(expected):
        adapter.up.mul_(0.5)
    layer, change = expected.inner.layers["pointwise"], merged["inner.layers.pointwise"]
    layer.weight.add_(2 * (change.up @ change.down.flatten(1)).view_as(layer.weight))
    torch.testing.assert_close(found, predicted(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(LoraError, match="two with min_rank change inner"):
        draw_with(Timed(), [(own, 1.0), (own, 1.0)])
