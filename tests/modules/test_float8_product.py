"""Frozen weights that multiply in float8: against rounding in numpy and products in float64, and the exact layer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from families.common import precision
from families.common.precision import freeze
from modules.float8 import keep_in_float8
from modules.float8_product import DTYPE, Float8ProductLinear
from modules.lora import LoraSettings, adapters, add_adapters, merge
from warpcore.errors import UserError


def packed(layer: nn.Module) -> nn.Module:
    keep_in_float8(layer.requires_grad_(False), DTYPE, "cpu", Float8ProductLinear)
    return layer


def e4m3(matrix: np.ndarray) -> np.ndarray:
    """The nearest numbers of one sign, four exponent and three mantissa bits: steps of 2^(exponent - 3), from 2^-9."""
    _, above = np.frexp(np.maximum(np.abs(matrix), 2.0**-6))
    step = 2.0 ** (above - 4)
    return np.clip(np.rint(matrix / step) * step, -448, 448)


def by_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows rounded on the scale at which their largest number is 448, in float32 as the layer does, and the scales."""
    scale = np.abs(matrix).max(axis=1, keepdims=True) / np.float32(448)
    numbers = e4m3(np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale > 0))
    return numbers.astype(np.float64), np.where(scale > 0, scale, 1).astype(np.float64)


@given(rows=st.integers(1, 40), columns=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_outputs_and_gradients_are_products_of_rounded_numbers(rows, columns, width, seed):
    """Products are rounded to bfloat16, which has eight bits."""
    torch.manual_seed(seed)
    layer = nn.Linear(16 * columns, 16 * width, bias=False)
    layer.weight.data[0] = 0
    x = torch.randn(rows, 16 * columns) * torch.logspace(-4, 4, rows)[:, None]
    x[-1] = 0
    x.requires_grad_()
    output = packed(layer)(x)
    numbers, scale = by_rows(x.detach().numpy())
    expected = numbers @ layer.weight.double().numpy().T
    np.testing.assert_allclose(output.detach().double() / scale, expected, rtol=2**-7, atol=1e-3)
    grad = torch.randn_like(output)
    output.backward(grad)
    numbers, scale = by_rows((grad * layer.scale).numpy())
    expected = numbers @ layer.stored.double().numpy()
    np.testing.assert_allclose(x.grad.double() / scale, expected, rtol=2**-7, atol=1)  # up to 448^2


def test_a_layer_is_near_the_exact_one_both_ways():
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 64), torch.randn(2, 20, 512, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    F.linear(other, layer.weight, layer.bias).square().sum().backward()
    exact = F.linear(x.detach(), layer.weight, layer.bias)
    output = packed(layer)(x)
    assert type(layer) is Float8ProductLinear
    assert layer.stored.dtype == torch.float8_e4m3fn
    output.square().sum().backward()
    for found, true, most in ((output - layer.bias, exact - layer.bias, 0.05), (x.grad, other.grad, 0.07)):
        assert 0.005 < float(((found - true).norm() / true.norm()).detach()) < most


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_adapters_learn_beside_it(dora):
    torch.manual_seed(0)
    network = nn.Sequential(packed(nn.Linear(64, 32)))
    add_adapters(network, ["."], LoraSettings(rank=4, alpha=4, dora=dora))
    layer, ((_, _, adapter),) = network[0], adapters(network)
    adapter.up.data.normal_(std=0.1)
    x = torch.randn(6, 64)
    network(x).square().mean().backward()
    down, up = (t.detach().double().requires_grad_() for t in (adapter.down, adapter.up))
    weight = layer.weight.double() + up @ down
    if dora:
        weight = weight * (layer.weight.double().norm(dim=1) / weight.norm(dim=1).detach())[:, None]
    F.linear(x.double(), weight, layer.bias.double()).square().mean().backward()
    for ours, exact in ((adapter.down, down), (adapter.up, up)):
        assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 0.06
    with pytest.raises(TypeError, match="packed weights cannot be changed"):
        merge(network)


@pytest.mark.filterwarnings("error:Dynamo")
def test_compiled_code_is_one_graph_and_nothing_of_what_goes_in_is_kept():
    network, graphs, kept = nn.Sequential(packed(nn.Linear(32, 16))), [], []
    add_adapters(network, ["."], LoraSettings(rank=2, alpha=2))
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(5, 32)), network(torch.ones(5, 32)))
    assert len(graphs) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(nn.Linear(32, 32))(torch.randn(5, 32, requires_grad=True))
    assert sorted(str(t.dtype) for t in kept) == ["torch.float32", "torch.float8_e4m3fn"]


def test_matrices_that_gpus_cannot_multiply_stay_and_the_dtype_is_the_weights_whatever_autocast_says():
    network = packed(nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 24)).bfloat16())
    assert [type(layer) for layer in network] == [Float8ProductLinear, nn.Linear]
    with torch.autocast("cpu", torch.float16):
        assert network[0](torch.ones(2, 3, 48)).dtype == torch.bfloat16


def test_a_gpu_that_cannot_multiply_in_float8_is_told_what_to_write(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(UserError, match=r"frozen_weights: float8 needs a GPU .* not RTX 3090; write int8"):
        freeze(nn.Linear(16, 16), "float8", "frozen_weights", "cuda")
    with pytest.raises(UserError, match="write int8"):  # weights are packed elsewhere where blocks are swapped
        freeze(nn.Linear(16, 16), "float8", "frozen_weights", "cpu", computes_on="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    taken = []
    monkeypatch.setattr(precision, "keep_in_float8", lambda network, *how: taken.append(how) or packed(network))
    freeze(nn.Linear(16, 16), "float8", "frozen_weights", "cuda")
    assert taken == [(DTYPE, "cuda", Float8ProductLinear)]
    monkeypatch.undo()
    with pytest.raises(UserError, match="no linear layer has sides that 16 divides, as float8 needs; write int8"):
        freeze(nn.Linear(24, 16), "float8", "frozen_weights")
    with pytest.raises(UserError, match="MPS has no float8"):
        freeze(nn.Linear(16, 16), "float8", "frozen_weights", "mps")
