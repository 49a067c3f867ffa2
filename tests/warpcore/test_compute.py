"""Compiled blocks compute the same; fp8 computes nearly the same, and says where it cannot."""

import shutil

import pytest
import torch

from tests.modules.test_feed_forward import losses, network
from tests.modules.test_quantise import INPUTS
from warpcore.compute import compile_blocks, to_fp8
from warpcore.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_losses_of_compiled_blocks_agree():
    compiled, plain = network(), network()
    for one in (compiled, plain):
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled code draws other numbers
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
    names = [name for name, _ in compiled.named_parameters()]
    compile_blocks(compiled, CPU)
    torch.testing.assert_close(
        losses(compiled, torch.float32, updates=2), losses(plain, torch.float32, updates=2), rtol=1e-5, atol=0
    )
    assert [name for name, _ in compiled.named_parameters()] == names


def test_without_a_compiler_the_key_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"compile: needs a C\+\+ compiler"):
        compile_blocks(network(), CPU)


def test_fp8_is_refused_without_the_hardware():
    with pytest.raises(UserError, match=r"fp8: needs a GPU that multiplies in fp8 .* not CPU"):
        to_fp8(network(), CPU)


def test_fp8_is_near_and_learns():
    pytest.importorskip("torchao", reason="an optional package")
    plain, converted = network().eval(), network().eval()
    names = to_fp8(converted, CPU, emulate=True)
    assert "down_blocks.0.0.channelwise.0" in names
    assert not any("clip" in name for name in names)
    assert converted.state_dict().keys() == plain.state_dict().keys()
    expected, near = plain(**INPUTS), converted(**INPUTS)
    assert 1e-5 < (near - expected).norm() / expected.norm() < 0.1
    near.square().mean().backward()
    assert converted.down_blocks[0][0].channelwise[0].weight.grad.abs().sum() > 0
