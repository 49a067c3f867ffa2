"""Compiled blocks compute the same; fp8 computes nearly the same, and says where it cannot."""

import shutil
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from tests.fake_gpu import GPU, FakeGpu
from tests.modules.test_feed_forward import losses, network
from tests.modules.test_quantise import INPUTS
from tests.warpcore.runs import numbers, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser
from warpcore import optim
from warpcore.compute import begin_graphs, check_graphs, compile_blocks, to_fp8
from warpcore.config import Config, make_config
from warpcore.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_losses_of_compiled_blocks_agree():
    torch._dynamo.reset()  # it would compile for any size what another test has compiled for other sizes
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


def config(**changes) -> Config:
    return make_config(
        Config,
        {"checkpoint_path": "x", "experiment_id": "x", "webdataset_path": "x.tar", "batch_size": 4, "updates": 1}
        | changes,
    )


@pytest.mark.parametrize(
    ("changes", "device", "sharded", "message"),
    [
        ({}, CPU, False, r"CUDA graphs, which need an NVIDIA GPU, not CPU; write compile: blocks"),
        ({}, torch.device("mps"), False, "not MPS; write compile: blocks"),
        (
            {"use_fsdp": True},
            GPU,
            True,
            r"compile: graphs .* FSDP .*; write compile: blocks, or train with one process",
        ),
        ({"offload": ["encoders"]}, GPU, False, r"compile: graphs .* offload: \['encoders'\] .* or remove offload"),
    ],
)
def test_graphs_are_refused_where_they_cannot_work(changes, device, sharded, message):
    with pytest.raises(UserError, match=message):
        check_graphs(config(compile="graphs", **changes), device, sharded)
    check_graphs(config(compile="blocks", **changes), device, sharded)
    check_graphs(config(compile=True, **changes), device, sharded)
    check_graphs(config(compile="graphs"), GPU, False)


def test_what_can_be_compiled_is_named():
    with pytest.raises(UserError, match=r"compile.*blocks.*graphs"):
        config(compile="everything")


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[tuple]]:
    """(settings, calls) of each `torch.compile`."""
    found = []

    def compile(function, **settings):
        calls = []
        found.append((settings, calls))

        def call(*inputs, **named):
            calls.append(inputs)
            return function(*inputs, **named)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("warpcore.compute.has_triton", lambda: True)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield found


def test_graphs_are_asked_of_pytorch_and_used_in_training_alone(asked):
    one = network()
    compile_blocks(one, GPU, graphs=True)
    plain, graphs = asked[::2], asked[1::2]
    assert len(plain) == len(graphs) == len(one.blocks)
    assert all(settings == {} for settings, _ in plain)
    assert all(settings == {"mode": "reduce-overhead", "dynamic": False} for settings, _ in graphs)
    with torch.no_grad():
        one(**INPUTS)
    assert all(len(calls) == 1 for _, calls in plain)
    assert not any(calls for _, calls in graphs)
    one(**INPUTS).sum().backward()
    assert all(len(calls) == 1 for _, calls in plain)
    assert all(len(calls) == 1 for _, calls in graphs)
    assert torch._dynamo.config.recompile_limit >= 1000


def test_blocks_are_compiled_without_graphs_unless_asked(asked):
    one = network()
    compile_blocks(one, GPU)
    assert [settings for settings, _ in asked] == [{}] * len(one.blocks)
    assert torch._dynamo.config.recompile_limit == 64


def test_gradients_outlive_the_memory_of_graphs(monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    trained, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    of_graphs = torch.ones(3)
    begin_graphs([trained, unused], accumulated=False)
    trained.grad = of_graphs
    begin_graphs([trained, unused], accumulated=True)
    of_graphs.fill_(7.0)  # the next replay writes there
    trained.sum().backward()
    assert trained.grad.tolist() == [2.0, 2.0, 2.0]
    assert unused.grad is None
    assert len(marks) == 2


class Graphed(Denoiser):
    """A run whose network takes part in graphs, on a CPU that has none."""

    asked: ClassVar[list[bool]] = []

    def build(self):
        networks = super().build()
        networks["generator"].compile_blocks = lambda graphs=False: self.asked.append(graphs)
        return networks


@pytest.mark.bits
@pytest.mark.integration
def test_a_run_marks_each_micro_batch_and_accumulates_as_without_graphs(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "a.tar", 8)
    expected = train_here(tiny_settings(tmp_path / "plain", shard, updates=2, grad_accum_steps=2))[1]
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr("warpcore.compute.check_graphs", lambda *config, **sharded: None)
    settings = tiny_settings(tmp_path / "graphs", shard, updates=2, grad_accum_steps=2, compile="graphs")
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        found = train_here(settings, Graphed)[1]
    assert Graphed.asked == [True]
    assert len(marks) == 4
    assert numbers(found) == numbers(expected)


def test_adamw_of_parameters_on_a_gpu_is_fused():
    with FakeGpu():
        layer = torch.nn.Linear(4, 4, device=GPU)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        groups = [{"params": list(parameters), "param_names": list(names)}]
        for name in ("adamw", "muon"):
            adamw = optim.build_optimizers(name, groups, lr=1e-3)[-1]
            assert isinstance(adamw, torch.optim.AdamW)
            assert all(group["fused"] for group in adamw.param_groups)
            assert adamw._step_supports_amp_scaling


def test_fp8_is_refused_without_the_hardware():
    with pytest.raises(UserError, match=r"fp8: needs a GPU that multiplies in fp8 .* not CPU"):
        to_fp8(network(), CPU)


@pytest.mark.integration
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
