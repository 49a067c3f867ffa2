"""Optimizers: resuming, skipping, learning rates and gradient norms."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from warpcore import gradients, optim
from warpcore.lr_schedules import lr_at

PLAIN = ["adamw", "adafactor", "schedulefree", "muon", "lion", "prodigy", "came"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        # No bias: softmax doesn't see that of the keys, so its gradient is rounding noise, which AdamW blows up.
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 601)  # large enough for 8 bits; no two processes hold equal shares
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens)[0])
        return self.head(tokens)


def make(name, **settings):
    torch.manual_seed(0)
    net = Net()
    return net, build(name, net, **settings)


def build(name, net, **settings):
    names, parameters = zip(*net.named_parameters(), strict=True)
    groups = [{"params": list(parameters), "param_names": list(names)}]
    optimizers = optim.build_optimizers(name, groups, lr=1e-2, **{"weight_decay": 0.1, **settings})
    optim.train_mode(optimizers)
    return optimizers


def train(net, optimizers, updates, found_inf=0.0):
    for update in updates:
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(update))
        for parameter in net.parameters():
            parameter.grad = None
        net(x.to(net.head.weight.dtype)).square().mean().backward()
        optim.set_lr(optimizers, 1e-2 / update)
        optim.step(optimizers, torch.tensor(found_inf))


def weights(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


with_8_bits = pytest.param(
    "adamw8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
)


def muons_own(name, shape):
    return {"linear": [name]} if len(shape) == 2 else {"linear": [], "convolutions": [name]}


@pytest.mark.bits
@pytest.mark.parametrize("name", [*PLAIN, with_8_bits])
def test_a_resumed_optimizer_trains_on_bit_for_bit(name, tmp_path):
    net, optimizers = make(name)
    train(net, optimizers, range(1, 4))
    tensors, rest = optim.optimizer_state(optimizers)
    torch.save((tensors, weights(net)), tmp_path / "state.pt")
    rest = json.loads(json.dumps(rest))
    train(net, optimizers, range(4, 7))

    tensors, saved_weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, again = make(name)
    resumed.load_state_dict(saved_weights)
    own = optim.allocate_optimizer_state(again, {key: (t.shape, t.dtype) for key, t in tensors.items()})
    assert_identical(weights(resumed), saved_weights)  # allocating must not move the weights
    assert own.keys() == tensors.keys()
    assert not any("unused" in key for key in own)
    optim.load_optimizer_state(again, tensors, rest)
    assert_identical(optim.optimizer_state(again)[0], tensors)
    train(resumed, again, range(4, 7))
    assert_identical(weights(resumed), weights(net))
    assert_identical(optim.optimizer_state(again)[0], optim.optimizer_state(optimizers)[0])
    optim.eval_mode(optimizers)
    optim.eval_mode(again)
    assert_identical(weights(resumed), weights(net))


@pytest.mark.bits
def test_looking_at_the_weights_for_use_does_not_change_training():
    net, optimizers = make("schedulefree")
    train(net, optimizers, [1, 2, 3])
    before = weights(net)
    for _ in range(2):
        optim.eval_mode(optimizers)
        optim.eval_mode(optimizers)
        assert not torch.equal(net.head.weight, before["head.weight"])
        optim.train_mode(optimizers)
        assert_identical(weights(net), before)


def test_a_resumed_run_follows_its_config_not_the_checkpoint():
    net, optimizers = make("adamw", weight_decay=0.1)
    train(net, optimizers, [1])
    state = optim.optimizer_state(optimizers)
    _, again = make("adamw", weight_decay=0.5)
    optim.load_optimizer_state(again, *state)
    assert {group["weight_decay"] for group in again[0].param_groups} == {0.5, 0.0}


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_on_non_finite_gradients_changes_nothing(name):
    net, optimizers = make(name)
    train(net, optimizers, [1, 2])
    before, state = weights(net), {k: t.clone() for k, t in optim.optimizer_state(optimizers)[0].items()}
    for parameter in net.parameters():
        parameter.grad = None if parameter.grad is None else torch.full_like(parameter, math.nan)
    optim.step(optimizers, torch.tensor(3.0))
    assert_identical(weights(net), before)
    assert_identical(optim.optimizer_state(optimizers)[0], state)
    train(net, optimizers, [3])
    assert not torch.equal(net.head.weight, before["head.weight"])


def test_adamw_never_reads_the_flag_on_the_host(monkeypatch):
    net, optimizers = make("adamw")

    def read(_):
        raise AssertionError("host read")

    monkeypatch.setattr(torch.Tensor, "item", read)
    train(net, optimizers, [1])


def test_adamw_equals_a_step_written_by_hand():
    net, optimizers = make("adamw", betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    before = weights(net)
    train(net, optimizers, [1])
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            assert torch.equal(parameter, before[name])
            continue
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-6)
        torch.testing.assert_close(parameter.detach(), expected, atol=2e-6, rtol=0)


def test_muon_gets_hidden_matrices_and_adamw_everything_else():
    _, (muon, adamw) = make("muon")
    taken = {name for group in muon.param_groups for name in group["param_names"]}
    assert taken == {"attention.in_proj_weight", "attention.out_proj.weight", "head.weight", "unused.weight"}
    assert "conv.weight" in {name for group in adamw.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 2, 1, 3, 3), (4, 4, 1), (6, 10), (10, 6)])
def test_muon_takes_matrices_and_kernels_as_the_matrices_that_they_multiply_by(shape):
    kernel = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    group = {"params": [kernel], "param_names": ["kernel"]}
    (ours,) = optim.build_optimizers("muon", [group], lr=0.02, weight_decay=0.1, **muons_own("kernel", shape))
    theirs = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        kernel.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.flatten(1)
        ours.step(), theirs.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), atol=1e-6, rtol=1e-5)


def test_groups_keep_their_rate_relative_to_the_run():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    optimizers = optim.build_optimizers(
        "adamw",
        [{"params": [a], "param_names": ["a"]}, {"params": [b], "param_names": ["b"], "lr_scale": 0.5}],
        lr=1.0,
    )
    optim.set_lr(optimizers, 0.2)
    rates = {group["param_names"][0]: group["lr"] for group in optimizers[0].param_groups}
    assert rates == {"a": 0.2, "b": 0.1}


def test_a_missing_package_and_an_unknown_name_say_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make("adamw8bit")
    with pytest.raises(ValueError, match="write one of adamw, adamw8bit, adafactor"):
        make("adam")


KERNELS = {"convolutions": {"conv.weight"}}


@pytest.mark.parametrize(
    ("saved", "resumed", "key"),
    [
        (("adamw", {}), ("adafactor", {}), "optimizer: adamw"),
        (("muon", {}), ("adamw", {}), "optimizer: muon"),
        (("schedulefree", {}), ("lion", {}), "optimizer: schedulefree"),
        (("came", {}), ("lion", {}), "optimizer: came"),
        (("muon", KERNELS), ("muon", {}), "muon_convolutions: true"),
        (("muon", {}), ("muon", KERNELS), "muon_convolutions: false"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_the_name_of_its_key(saved, resumed, key):
    net, optimizers = make(saved[0], **saved[1])
    train(net, optimizers, [1])
    tensors, rest = optim.optimizer_state(optimizers)
    here = make(resumed[0], **resumed[1])[1]
    message = f"resume with the optimizer and network that were saved: {key}$"
    with pytest.raises(ValueError, match=message):
        optim.load_optimizer_state(here, tensors, rest)
    with pytest.raises(ValueError, match=message):  # before anything is allocated
        optim.check_same_optimizers(here, rest)


def test_the_state_of_another_network_is_refused():
    net, optimizers = make("adamw")
    train(net, optimizers, [1])
    tensors, rest = optim.optimizer_state(optimizers)
    tensors["head.weight.exp_avg"] = torch.zeros(601, 9)
    with pytest.raises(ValueError, match=r"head\.weight\.exp_avg.*\(601, 9\).*\(601, 8\)"):
        optim.load_optimizer_state(make("adamw")[1], tensors, rest)
    tensors["elsewhere.weight.exp_avg"] = tensors.pop("head.weight.exp_avg")
    with pytest.raises(ValueError, match="elsewhere"):
        optim.load_optimizer_state(make("adamw")[1], tensors, rest)


def test_learning_rates():
    def rates(schedule, warmup, ratio=0.1):
        settings = {"lr": 2.0, "warmup_updates": warmup, "updates": 12, "min_lr_ratio": ratio}
        return [lr_at(update, schedule=schedule, **settings) for update in range(1, 15)]

    assert rates("constant", 4) == [0.5, 1.0, 1.5] + [2.0] * 11
    assert rates("constant", 1) == rates("constant", 0) == [2.0] * 14
    linear = rates("linear", 2, 0.0)
    assert linear[:2] == [1.0, 2.0]
    assert linear[6] == pytest.approx(1.0)
    assert linear[11:] == [0.0] * 3
    cosine = rates("cosine", 2)
    assert cosine[1] == 2.0
    assert cosine[6] == pytest.approx(1.1)
    assert cosine[4] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(0.3 * math.pi)) / 2))
    assert cosine[11:] == pytest.approx([0.2] * 3)
    assert rates("cosine", 0)[0] == 2.0
    with pytest.raises(ValueError, match="constant, cosine, linear, rex"):
        rates("step", 1)


GROUPS = {
    "all": ".",
    "queries and keys": r"in_proj_weight\.(q|k)$",
    "values": r"in_proj_weight\.v",
    "attention": "attention",
    "unused": "unused",
}


def test_gradient_norms_by_group():
    net, optimizers = make("adamw")
    train(net, optimizers, [1])
    norms = gradients.gradient_norms(gradients.gradient_groups(net.named_parameters(), GROUPS))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    expected = {
        "all": list(found.values()),
        "queries and keys": [found["attention.in_proj_weight"][:16]],
        "values": [found["attention.in_proj_weight"][16:]],
        "attention": [g for name, g in found.items() if "attention" in name],
        "unused": [torch.zeros(1)],
    }
    for group, tensors in expected.items():
        total = torch.cat([tensor.flatten() for tensor in tensors]).norm()
        torch.testing.assert_close(norms[group], total)


def test_norms_are_summed_in_the_order_of_the_parameters():
    """Not in that of a set of names, which differs from process to process, and so would the last digits."""
    parameters = [(f"layer{number}.weight", nn.Parameter(torch.zeros(1))) for number in range(20)]
    (parts,) = gradients.gradient_groups(parameters, {"all": "."}).values()
    assert [id(part.parameter) for part in parts] == [id(parameter) for _, parameter in parameters]


def test_a_group_that_finds_nothing_names_near_parameters():
    with pytest.raises(ValueError, match=r"'qk'.*in_proj_wieght.*near names:.*attention\.in_proj_weight"):
        gradients.gradient_groups(Net().named_parameters(), {"qk": r"attention\.in_proj_wieght"})
    with pytest.raises(ValueError, match=r"'qk'.*no regular expression"):
        gradients.gradient_groups(Net().named_parameters(), {"qk": "("})
