"""Steps in the backward pass: the updates are those of steps after it, and gradients are not kept."""

import math
import signal

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.tiers import represented_by
from tests.warpcore.data.tars import write_shard as write_sizes
from tests.warpcore.runs import (
    finish,
    load_weights,
    numbers,
    read_metrics,
    signal_at,
    start,
    tiny_settings,
    train_here,
    write_shard,
)
from tests.warpcore.test_unequal_micro_batches import LearnSizes, SizesConfig, settings_of
from tests.warpcore.tiny import Denoiser
from warpcore import gradients, optim
from warpcore.batch_size import split_batch
from warpcore.config import Config, ConfigError, make_config
from warpcore.errors import UserError
from warpcore.fused_backward import FusedBackward, check_one_process
from warpcore.gradients import gradient_groups, mean_groups
from warpcore.meta import PeakMemory

OPTIMIZERS = sorted(optim.OPTIMIZERS.keys() - {"adamw8bit", "prodigy"})
"""Prodigy is refused, and the package of adamw8bit needs a GPU."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FUSED = {"fused_backward": True, "clip_grad_norm": None}


class Net(nn.Module):
    """With a layer that is used twice, layers that are computed again in the backward pass, and one without use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.inner = nn.Linear(8, 8)
        self.shift = nn.Parameter(torch.randn(8))  # its gradient comes before the layers are computed again
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 40)
        self.unused = nn.Linear(2, 2)

    def block(self, tokens):
        return self.inner(self.twice(tokens).tanh()) + self.shift

    def forward(self, x):
        tokens = self.twice(self.conv(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(checkpoint(self.block, tokens, use_reentrant=False)))


class Trained:
    """A network with its optimizers, which steps in the backward pass or after it."""

    def __init__(self, name: str, dtype: torch.dtype, fused: bool, largest_norm: float | None = None):
        torch.manual_seed(0)
        self.net = Net().to(dtype)
        self.parameters = dict(self.net.named_parameters())
        split = [{n for n in self.parameters if n.startswith("head")}, {"unused.weight", "unused.bias"}]
        split = [self.parameters.keys() - split[0] - split[1], *split]
        groups = [
            {"params": [self.parameters[n] for n in names], "param_names": list(names), "lr_scale": scale}
            for names, scale in zip(map(sorted, split), (1.0, 0.5, 1.0), strict=True)
        ]
        kernels = ["conv.weight"]
        self.optimizers = optim.build_optimizers(name, groups, lr=1e-2, weight_decay=0.1, convolutions=kernels)
        optim.train_mode(self.optimizers)
        self.groups = (
            gradient_groups(self.parameters.items(), {"weights": "weight$"}),
            mean_groups(self.parameters, {"biases": "bias$"}),
        )
        self.largest_norm = largest_norm
        self.fused = (
            FusedBackward(self.optimizers, self.parameters, *self.groups, largest_norm=largest_norm) if fused else None
        )

    def update(self, number: int, loss_of=lambda output: output.square().mean()):
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        optim.set_lr(self.optimizers, 1e-2 / number)
        loss = loss_of(self.net(x.to(self.net.shift.dtype)))
        if self.fused is not None:
            self.fused.backward(loss)
            return self.fused.finish()
        loss.backward()
        norm, norms = gradients.clipped([*self.parameters.values()], None, self.largest_norm, *self.groups)
        optim.step(self.optimizers, ~torch.isfinite(norm) | ~torch.isfinite(loss))
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, norms

    def everything(self) -> dict[str, torch.Tensor]:
        state, rest = optim.optimizer_state(self.optimizers)
        counted = {f"group {i}": torch.tensor(group.get("steps", -1)) for i, group in enumerate(self._groups())}
        found = state | counted | {name: p.detach().clone() for name, p in self.parameters.items()}
        assert rest["optimizers"]
        return {name: tensor.clone() for name, tensor in found.items()}

    def _groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_the_backward_pass_are_those_after_it(name, dtype):
    whole, fused = (Trained(name, DTYPES[dtype], fused, largest_norm=0.3) for fused in (False, True))
    before = whole.everything()
    for number in range(1, 4):
        (norm, norms), (same, others) = whole.update(number), fused.update(number)
        assert norm == same > 0.3
        assert norms.keys() == others.keys() == {"grad_norm/weights", "grad_mean/biases"}
        for key, value in norms.items():
            torch.testing.assert_close(
                others[key].float(), value.float(), rtol=1e-6 if dtype == "float32" else 1e-2, atol=0
            )
    after = fused.everything()
    assert_equal(after, whole.everything())
    moved = {name for name in before if name in whole.parameters and not torch.equal(before[name], after[name])}
    assert moved == {name for name in whole.parameters if "unused" not in name}


@pytest.mark.bits
@pytest.mark.parametrize("name", ["adamw", "came", "schedulefree"])
def test_state_goes_over_from_the_one_way_to_the_other(name):
    expected = Trained(name, torch.bfloat16, fused=False)
    for number in range(1, 5):
        expected.update(number)
    kept = None
    for number, fused in enumerate((True, False, True, False), 1):
        now = Trained(name, torch.bfloat16, fused)
        if kept is not None:
            now.net.load_state_dict(kept.net.state_dict())
            optim.load_optimizer_state(now.optimizers, *optim.optimizer_state(kept.optimizers))
        now.update(number)
        kept = now
    assert_equal(kept.everything(), expected.everything())


@pytest.mark.parametrize("fused", [True, False])
def test_no_gradient_waits_for_another(fused):
    trained, waiting = Trained("adamw", torch.float32, fused), []
    parameters = trained.parameters.values()
    for parameter in parameters:
        parameter.register_hook(lambda _: waiting.append(sum(p.grad is not None for p in parameters)))
    trained.update(1)
    with_gradient = len(parameters) - 2
    assert waiting == ([0] * with_gradient if fused else list(range(with_gradient)))


@pytest.mark.parametrize("fused", [True, False])
def test_memory_holds_the_gradient_of_one_layer(fused):
    layers, width = 12, 128
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    parameters = dict(net.named_parameters())
    groups = [{"params": list(parameters.values()), "param_names": list(parameters)}]
    optimizers = optim.build_optimizers("lion", groups, lr=1e-3)
    if fused:
        FusedBackward(optimizers, parameters, {}, {})
    net(torch.ones(1, width)).sum().backward()  # which makes the state, where it is fused
    states = [value for optimizer in optimizers for one in optimizer.state.values() for value in one.values()]
    net.zero_grad()
    loss = net(torch.ones(1, width)).sum()
    with PeakMemory([*parameters.values(), *states]) as memory:
        loss.backward()
    of_layers = memory.peak / (4 * width**2)
    assert of_layers < 6 if fused else of_layers >= layers


class FailingGradient(torch.autograd.Function):
    """Passes a number on, and a gradient that is not a number back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "came"])
def test_a_gradient_that_is_not_finite_leaves_all_before_it_as_it_was(name, dtype):
    trained = Trained(name, DTYPES[dtype], fused=True)
    trained.update(1)
    before = trained.everything()
    trained.net.norm.register_forward_pre_hook(lambda _, inputs: FailingGradient.apply(inputs[0]))
    norm, _ = trained.update(2)
    assert not norm.isfinite()
    after = trained.everything()
    behind = ("head.weight", "head.bias", "norm.weight", "norm.bias")
    for key, tensor in after.items():
        if not key.startswith("group"):
            assert tensor.isfinite().all(), key
            assert torch.equal(tensor, before[key]) == (not key.startswith(behind) and not key.endswith(".s")), key


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_a_loss_that_is_not_finite_changes_nothing(name):
    trained = Trained(name, torch.bfloat16, fused=True)
    trained.update(1)
    before = trained.everything()
    trained.update(2, loss_of=lambda output: output.square().mean() * torch.inf)
    after = trained.everything()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if not key.startswith("group"))


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_an_update_whose_samples_cannot_be_read_counts_as_without_the_key(name):
    whole, fused = (Trained(name, torch.bfloat16, fused) for fused in (False, True))
    for trained in (whole, fused):
        trained.update(1)
    optim.step(whole.optimizers, torch.ones((), dtype=torch.bool))
    fused.fused.finish()
    assert_equal(fused.everything(), whole.everything())


def test_clipping_tensor_by_tensor_bounds_the_norm_of_all():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((30,), (60,), (10,), (7,))]
    for parameter, scale in zip(parameters, (1.0, 5.0, 1e-3), strict=False):
        parameter.grad = scale * torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters[:3]]
    norm, _ = gradients.clipped(parameters, None, 2.0, {}, {})
    assert norm.item() == pytest.approx(math.sqrt(sum(one.square().sum().item() for one in before)), rel=1e-5)
    for gradient, parameter in zip(before, parameters, strict=False):
        limit = 2.0 * math.sqrt(parameter.numel() / 107)
        expected = gradient * min(1.0, limit / gradient.norm().item())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert math.sqrt(sum(p.grad.square().sum().item() for p in parameters[:3])) < 2.0
    assert parameters[3].grad is None


REFUSED = {
    "clip_grad_norm: write clip_grad_norm: null, and clip_tensor_norm: 1.0": {"clip_grad_norm": 1.0},
    "gradient_topk: remove one": {"gradient_topk": 0.5},
    "optimizer: prodigy: write another optimizer": {"optimizer": "prodigy", "lr": 1.0},
    "dtype: float16: write dtype: bfloat16 or float32": {"dtype": "float16"},
    "compile: graphs: write compile: blocks": {"compile": "graphs"},
    "fsdp_cpu_offload: remove one": {"use_fsdp": True, "fsdp_cpu_offload": True},
    "fused_backward: write batch_size: 2": {"micro_batch_size": 2},
    "fused_backward: write grad_accum_steps: 1": {"grad_accum_steps": 2},
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_has_to_know_all_gradients_is_refused_with_a_remedy(told, tmp_path):
    given = tiny_settings(tmp_path, tmp_path / "a.tar")
    make_config(Config, given | FUSED)
    make_config(Config, given | FUSED | {"micro_batch_size": 4, "grad_accum_steps": 1})
    key, _, remedy = told.rpartition(": write" if "write" in told else ": remove")
    with pytest.raises(ConfigError, match=rf"{key}\b.*{'write' if 'write' in told else 'remove'}{remedy}"):
        make_config(Config, given | FUSED | REFUSED[told])


def test_further_refusals(tmp_path):
    given = tiny_settings(tmp_path, tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=r"clip_tensor_norm .* write clip_grad_norm: null"):
        make_config(Config, given | {"clip_tensor_norm": 1.0})
    config = make_config(Config, given | FUSED)
    assert split_batch(config, 1, None) == (4, 1)
    with pytest.raises(UserError, match="write batch_size: 2, or micro_batch_size: 4 with on_data_change: new_epoch"):
        split_batch(config, 1, {"micro_batch_size": 2})
    with pytest.raises(UserError, match="train with one process"):
        check_one_process(True, 2)
    check_one_process(False, 2)
    with pytest.raises(ConfigError, match="micro_batches_per_update: 1"):
        make_config(SizesConfig, settings_of(tmp_path, tmp_path / "a.tar", **FUSED))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 12)


REPORTED = {"grad_norm_groups": {"w": "weight$"}, "grad_mean_groups": {"w": "weight$"}, "clip_tensor_norm": 0.05}


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize("optimizer", represented_by("came", of=OPTIMIZERS))
def test_a_run_that_turns_it_on_and_off_is_the_run_without_it(optimizer, tmp_path, data):
    given = {"optimizer": optimizer, "lr": 1e-3, "updates": 6, "save_every": 2, **REPORTED, "clip_grad_norm": None}
    whole = tiny_settings(tmp_path, data, experiment_id="whole", **given)
    parts = whole | {"experiment_id": "parts"}
    _, expected = train_here(whole)
    for updates, fused in ((2, True), (4, False), (6, True)):
        status, lines = train_here(parts | {"updates": updates, "fused_backward": fused})
    assert status == 0
    for line, other in zip(lines, expected, strict=True):  # the norm of a group may be added up in another order
        assert line.pop("grad_norm/w") == pytest.approx(other.pop("grad_norm/w"), rel=1e-5)
    assert numbers(lines) == numbers(expected)
    for name in ("generator", "generator_ema"):
        assert_equal(load_weights(parts, name), load_weights(whole, name))


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.slow
def test_a_run_that_is_killed_resumes_exactly(tmp_path, data):
    given = FUSED | {"optimizer": "came", "lr": 1e-3, "weights_dtype": "bfloat16", "dropout": 0.1}
    whole = tiny_settings(tmp_path, data, experiment_id="whole", **given)
    killed = whole | {"experiment_id": "killed"}
    _, expected = train_here(whole)
    process = start(killed | {"seconds_per_micro_batch": 0.2})
    signal_at(process, killed, 6, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    status, output = finish(start(killed))
    assert status == 0, output
    assert numbers(read_metrics(killed)) == numbers(expected)
    assert_equal(load_weights(killed), load_weights(whole))


@pytest.mark.integration
@pytest.mark.bits
def test_micro_batches_of_many_sizes_make_the_same_updates(tmp_path):
    shard = write_sizes(tmp_path / "a.tar", 60, sizes=((16, 16), (16, 12), (12, 12), (8, 9)))
    given = settings_of(tmp_path, shard, micro_batches_per_update=1, updates=6, clip_tensor_norm=0.5)
    whole, fused = given | {"experiment_id": "whole"}, given | {"experiment_id": "fused", "fused_backward": True}
    _, expected = train_here(whole, LearnSizes, SizesConfig)
    _, lines = train_here(fused, LearnSizes, SizesConfig)
    assert len({line["samples"] for line in lines}) > 1
    assert numbers(lines) == numbers(expected)
    assert_equal(load_weights(fused), load_weights(whole))


@pytest.mark.integration
def test_updates_that_are_not_finite_are_counted_and_told(tmp_path, data, capsys):
    given = tiny_settings(tmp_path, data, **FUSED, break_update=3, max_nonfinite_updates=2, save_every=1, updates=3)
    train_here(given)
    before = load_weights(given)
    with pytest.raises(UserError, match="2 updates in a row, up to 5"):
        train_here(given | {"updates": 8})
    assert_equal(before, load_weights(given))
    assert "update 4 was skipped: no finite gradient" in capsys.readouterr().err


class FailingBackward(Denoiser):
    """Its first layer gets no finite gradient from the second update on."""

    def build(self):
        networks = super().build()
        networks["generator"][3].register_forward_pre_hook(
            lambda _, inputs: FailingGradient.apply(inputs[0]) if self.update and torch.is_grad_enabled() else None
        )
        return networks


@pytest.mark.integration
def test_an_update_that_is_made_in_part_is_told(tmp_path, data, capsys):
    given = tiny_settings(tmp_path, data, **FUSED, save_every=1, updates=1)
    train_here(given, FailingBackward)
    before = load_weights(given)
    train_here(given | {"updates": 2}, FailingBackward)
    after = load_weights(given)
    assert "update 2 was made in part, and the rest skipped: no finite gradient" in capsys.readouterr().err
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"3.weight", "3.bias"}
