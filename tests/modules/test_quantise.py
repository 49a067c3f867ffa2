"""Frozen weights in four bits: near the originals, a quarter of their size, and adapters learn through them."""

import pytest
import torch

from modules.lora import LoraSettings, adapters, add_adapters
from modules.stage_c import StageC
from tests.modules.test_lora import randomised

torchao = pytest.importorskip("torchao.quantization", reason="an optional package")
from modules.quantise import quantise  # noqa: E402


def small_network() -> StageC:
    torch.manual_seed(0)
    network = StageC(
        c_cond=128, c_hidden=[128, 128], nhead=[4, 4], blocks=[[1, 1], [1, 1]], c_clip_text=64, c_clip_text_pooled=64,
        c_clip_img=64, dropout=0.0,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network.requires_grad_(False).to(torch.bfloat16)


INPUTS = {
    "x": torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(1)), "r": torch.tensor([0.2, 0.7]),
    "clip_text": torch.ones(2, 5, 64), "clip_text_pooled": torch.ones(2, 1, 64), "clip_img": torch.zeros(2, 1, 64),
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"dora": True, "split_qkv": True}], ids=["plain", "DoRA"])
def test_adapters_learn_beside_four_bit_weights(settings):
    networks = [small_network(), small_network()]
    quantise(networks[0], "cpu")
    weight = networks[0].down_blocks[0][0].channelwise[0].weight
    assert isinstance(weight.data, torchao.NF4Tensor)
    assert isinstance(networks[0].down_blocks[0][2].attention.attn.in_proj_weight.data, torchao.NF4Tensor)
    assert weight.quantized_data.nbytes == weight.numel() // 2
    outputs, gradients = [], []
    for network in networks:
        add_adapters(network, [".attn", "channelwise"], LoraSettings(rank=4, alpha=4, **settings))
        torch.manual_seed(3)
        for _, _, adapter in adapters(network):
            adapter.down.data.normal_(std=0.1)
            adapter.up.data.normal_(std=0.1)
        outputs.append(network(**INPUTS).float())
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, _, a in adapters(network) for p in a.parameters()]))
        assert all(p.grad is None for name, p in network.named_parameters() if ".lora." not in name)
    assert 1e-4 < (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 0.15
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_the_backward_pass_keeps_four_bits_and_no_copy_of_the_weight():
    network = small_network()
    quantise(network, "cpu")
    add_adapters(network, [".attn"], LoraSettings(rank=4, alpha=4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        randomised(network)(**INPUTS)
    quantised = [p for p in network.parameters() if isinstance(p.data, torchao.NF4Tensor)]
    shapes = {tuple(p.shape) for p in quantised} - {(128, 128)}  # pointwise convolutions have this shape too
    plain = [t for t in kept if tuple(t.shape) in shapes and not isinstance(t, torchao.NF4Tensor)]
    assert len(shapes) > 3
    assert any(isinstance(t, torchao.NF4Tensor) for t in kept)
    assert plain == []
