"""Frozen weights in eight bits: rounded as the formats say, unpacked as they are used, and adapters learn beside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.float8 import FORMATS, Float8Linear, keep_in_float8
from modules.lora import LoraSettings, adapters, add_adapters, merge

FORMAT_NAMES = pytest.mark.parametrize("name", FORMATS)


def linear(*, rows: int = 24, columns: int = 40, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A frozen layer whose rows differ in size a million times, and one of which is zeros."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows).requires_grad_(False)
    layer.weight *= torch.logspace(-3, 3, rows)[:, None]
    layer.weight[3] = 0
    return layer.to(dtype)


def packed(layer: nn.Module, name: str) -> nn.Module:
    keep_in_float8(layer, FORMATS[name], "cpu")
    return layer


@FORMAT_NAMES
def test_a_weight_is_rounded_to_the_nearest_number_of_its_format_on_the_scale_of_its_row(name):
    exact, layer = linear().weight, packed(linear(), name)
    assert isinstance(layer, Float8Linear)
    assert layer.stored.dtype == FORMATS[name]
    assert layer.stored.nbytes == exact.numel()
    largest = exact.abs().amax(dim=1, keepdim=True)
    about = torch.finfo(FORMATS[name])
    # Half of the last bit of a number; near zero, half of the smallest number, on a scale where `largest` is at
    # least half of the format's largest.
    bound = torch.maximum(exact.abs() * about.eps / 2, about.smallest_normal * about.eps / 2 * 2 * largest / about.max)
    assert ((layer.weight - exact).abs() <= bound).all()
    assert (layer.stored.float().abs().amax(dim=1)[largest[:, 0] > 0] >= about.max * (0.5 - about.eps)).all()
    assert (layer.weight[3] == 0).all()
    exponents = layer.scale.log2()
    assert torch.equal(exponents, exponents.round())


@FORMAT_NAMES
def test_outputs_and_gradients_are_those_of_the_unpacked_weight(name):
    layer = packed(linear(), name)
    x = torch.randn(5, 40, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    torch.testing.assert_close(layer(x), F.linear(plain, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    F.linear(plain, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["plain", "DoRA"])
@FORMAT_NAMES
def test_adapters_learn_beside_it_as_beside_the_exact_weights(name, settings):
    """Against the formula y = (W + B A) x with W unpacked, in float64."""
    network = nn.Sequential(packed(nn.Linear(40, 24).requires_grad_(False).bfloat16().float(), name))
    add_adapters(network, ["."], LoraSettings(rank=4, alpha=4, **settings))
    layer, ((_, _, adapter),) = network[0], adapters(network)
    adapter.up.data.normal_(std=0.1)
    x = torch.randn(6, 40)
    network(x).square().mean().backward()
    down, up = (t.detach().double().requires_grad_() for t in (adapter.down, adapter.up))
    weight = layer.weight.double() + up @ down
    if settings:
        lengths = layer.weight.double().norm(dim=1), weight.norm(dim=1).detach()
        weight = weight * (lengths[0] / lengths[1])[:, None]
    F.linear(x.double(), weight, layer.bias.double()).square().mean().backward()
    for ours, exact in ((adapter.down, down), (adapter.up, up)):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert layer.stored.grad is None


def test_the_backward_pass_keeps_eight_bits_and_no_copy_of_the_weight():
    network = nn.Sequential(*(packed(nn.Linear(32, 32).requires_grad_(False), "float8_e4m3fn") for _ in range(2)))
    add_adapters(network, ["."], LoraSettings(rank=2, alpha=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        network(torch.randn(5, 32, requires_grad=True))
    wide = [t.dtype for t in kept if t.shape == (32, 32)]
    assert wide == [torch.float8_e4m3fn] * 2


def test_what_a_weight_is_in_eight_bits_is_computed_in_the_dtype_that_it_had_whatever_autocast_says():
    layer = packed(linear(dtype=torch.bfloat16), "float8_e4m3fn")
    with torch.autocast("cpu", torch.float16):
        assert layer(torch.ones(2, 40)).dtype == torch.bfloat16


def test_merging_into_eight_bits_is_refused():
    network = nn.Sequential(packed(linear(), "float8_e5m2"))
    add_adapters(network, ["."], LoraSettings(rank=2, alpha=2))
    with pytest.raises(TypeError, match="packed weights cannot be changed"):
        merge(network)
