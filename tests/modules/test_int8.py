"""Frozen weights that multiply in int8: against whole numbers in numpy, and beside the exact layer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from families.common.precision import freeze
from modules.int8 import Int8Linear, RotatedInt8Linear, keep_in_int8, rotated
from modules.lora import LoraSettings, adapters, add_adapters, merge
from warpcore.errors import UserError

ROTATE = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])


def packed(layer: nn.Linear, *, rotate: bool = False) -> nn.Module:
    keep_in_int8(layer.requires_grad_(False), "cpu", rotate=rotate)
    return layer


def by_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, and a scale for each row."""
    scale = np.abs(matrix).max(axis=1, keepdims=True) / 127
    return np.rint(np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale > 0)), scale


@given(rows=st.integers(1, 40), columns=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_outputs_and_gradients_are_products_of_whole_numbers(rows, columns, width, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(8 * columns, 8 * width)
    exact, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy()
    exact[0] = layer.weight.data[0] = 0
    x = torch.randn(rows, 8 * columns) * torch.logspace(-4, 4, rows)[:, None]
    x[-1] = 0
    x.requires_grad_()
    weight, weight_scale = by_rows(exact)
    numbers, scale = by_rows(x.detach().numpy())
    output = packed(layer)(x)
    np.testing.assert_allclose(
        output.detach(), numbers @ weight.T * scale * weight_scale.T + bias, rtol=1e-5, atol=1e-6
    )
    grad = torch.randn_like(output)
    output.backward(grad)
    numbers, scale = by_rows(grad.numpy() * weight_scale.T)
    # Halves round to even alike, but for what float32 makes of them: one of 127.
    np.testing.assert_allclose(
        x.grad, numbers @ weight * scale, rtol=1e-4, atol=float(2 * np.abs(weight).max() * scale.max())
    )


@pytest.mark.parametrize("width", [8, 24, 256, 768, 1000])
def test_a_rotation_is_a_hadamard_matrix_of_blocks_and_its_own_inverse(width):
    x = torch.randn(3, width, dtype=torch.float64)
    block = max(2**power for power in range(9) if width % 2**power == 0)
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = np.kron(np.eye(width // block), np.array(signs) / block**0.5)
    np.testing.assert_allclose(rotated(x), x.numpy() @ matrix, atol=1e-12)
    torch.testing.assert_close(rotated(rotated(x)), x)


@ROTATE
def test_a_layer_is_near_the_exact_one_and_a_rotation_brings_it_nearer_where_a_channel_is_far_larger(rotate):
    torch.manual_seed(0)
    layer = nn.Linear(512, 64)
    x = torch.randn(2, 20, 512)
    exact = F.linear(x, layer.weight, layer.bias)
    outlying = x.clone()
    outlying[..., 5] *= 100
    expected = F.linear(outlying, layer.weight, layer.bias)
    layer = packed(layer, rotate=rotate)
    assert type(layer) is (RotatedInt8Linear if rotate else Int8Linear)
    assert layer.stored.dtype == torch.int8

    def error(found, true):
        return float(((found - true).norm() / (true - layer.bias).norm()).detach())

    assert error(layer(x), exact) < 0.015
    assert (error(layer(outlying), expected) < 0.03) is rotate


@ROTATE
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_adapters_learn_beside_it(rotate, dora):
    torch.manual_seed(0)
    network = nn.Sequential(packed(nn.Linear(64, 24), rotate=rotate))
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
        assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 0.03
    with pytest.raises(TypeError, match="packed weights cannot be changed"):
        merge(network)


@pytest.mark.filterwarnings("error:Dynamo")
def test_compiled_code_is_one_graph_with_the_rotation_as_a_constant():
    network, graphs = nn.Sequential(packed(nn.Linear(32, 16), rotate=True), packed(nn.Linear(16, 8), rotate=True)), []
    add_adapters(network, ["."], LoraSettings(rank=2, alpha=2, dora=True))  # which look at the weight
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    x = torch.randn(5, 32)
    torch.testing.assert_close(compiled(x), network(x))
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target is torch.kron]
    assert len(graphs) == 1


def test_nothing_of_what_goes_in_is_kept_for_the_backward_pass():
    layer, kept = packed(nn.Linear(32, 32)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 32, requires_grad=True))
    assert sorted(str(t.dtype) for t in kept) == ["torch.float32", "torch.int8"]


def test_matrices_that_cublas_cannot_multiply_stay_and_the_dtype_is_the_weights_whatever_autocast_says():
    network = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 12)).bfloat16()
    keep_in_int8(network.requires_grad_(False), "cpu")
    assert [type(layer) for layer in network] == [Int8Linear, nn.Linear]
    with torch.autocast("cpu", torch.float16):
        assert network[0](torch.ones(2, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "int8_rotated"])
def test_a_network_of_which_nothing_would_be_packed_is_refused(kind):
    said = f"no linear layer has sides that 8 divides, as {kind} needs; write float8_e4m3fn or bfloat16"
    with pytest.raises(UserError, match=f"frozen_weights: {said}"):
        freeze(nn.Sequential(nn.Linear(16, 12), nn.Conv2d(8, 8, 1)), kind, "frozen_weights")
    freeze(nn.Sequential(nn.Linear(16, 12), nn.Linear(8, 8)), kind, "frozen_weights")
