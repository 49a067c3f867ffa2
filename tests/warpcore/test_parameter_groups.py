"""Parameter groups by name: who is in which, what they change, and that runs with them resume."""

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
from tests.tiers import represented_by
from tests.warpcore.runs import load_weights, numbers, read_metrics, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import Config, ConfigError, make_config
from warpcore.errors import UserError
from warpcore.optim import OPTIMIZERS, build_optimizers, set_lr, supports_dtensor
from warpcore.parameter_groups import ParameterGroup, freeze, group_of, optimizer_groups


def groups(*entries: dict) -> list[ParameterGroup]:
    return [ParameterGroup(**entry) for entry in entries]


def test_the_first_match_counts_with_or_without_the_networks_name():
    names = ["a.norm.weight", "a.conv.weight", "b.norm.weight", "b.conv.weight"]
    first, second = rules = groups({"pattern": "b.*"}, {"pattern": "norm.*"})
    assert group_of(names, rules) == {
        "a.norm.weight": second, "a.conv.weight": None, "b.norm.weight": first, "b.conv.weight": first,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (
            groups({"pattern": "*.norn.*"}),
            "'.*norn.*' matches no parameter that is trained; there are norm.bias, norm",
        ),
        (groups({"pattern": "*"}, {"pattern": "norm*"}), r"'norm\*' matches only what '\*' before it matches: put it"),
        (groups({"pattern": "*", "frozen": True}), "every parameter is frozen; name those to train before"),
    ],
)
def test_a_pattern_without_use_is_an_error(rules, told):
    networks = {"generator": nn.ModuleDict({"norm": nn.LayerNorm(2), "conv": nn.Linear(2, 2)})}
    with pytest.raises(UserError, match=told):
        freeze(networks, rules)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"lr_scale": 1}, "parameter_groups.0.pattern: this key is required"),
        ({"pattern": "*", "lr": 1}, "parameter_groups.0.lr: unknown key"),
        ({"pattern": "*", "lr_scale": -1}, "greater than 0"),
    ],
)
def test_a_mistake_in_an_entry_is_named(entry, told, tmp_path):
    keys = {key: value for key, value in tiny_settings(tmp_path, tmp_path).items() if key in Config.model_fields}
    with pytest.raises(ConfigError, match=told):
        make_config(Config, keys | {"parameter_groups": [entry]})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "schedulefree", "muon", "lion", "prodigy", "came"])
def test_every_optimizer_takes_the_settings_of_a_group(name):
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "last": nn.Linear(4, 4)})
    rules = groups({"pattern": "first.*", "lr_scale": 0.5, "weight_decay": 0.3}, {"pattern": "norm.*", "lr_scale": 2})
    named = {f"net.{key}": parameter for key, parameter in net.named_parameters()}
    made = optimizer_groups({"net": {"lr_scale": 0.1}}, named, rules)
    optimizers = build_optimizers(name, made, lr=1.0, weight_decay=0.2)
    set_lr(optimizers, 1.0)
    found = {
        key: (group["lr"], group["weight_decay"])
        for optimizer in optimizers for group in optimizer.param_groups for key in group["param_names"]
    }  # fmt: skip
    assert found == {
        "net.first.weight": (0.05, 0.3), "net.first.bias": (0.05, 0.3), "net.norm.weight": (0.2, 0.0),
        "net.norm.bias": (0.2, 0.0), "net.last.weight": (0.1, 0.2), "net.last.bias": (0.1, 0.0),
    }  # fmt: skip


RULES = [
    {"pattern": "3.bias", "frozen": True},
    {"pattern": "0.*", "lr_scale": 0.5, "weight_decay": 0.1},
    {"pattern": "generator.3.*", "lr_scale": 2.0},
]
"""For the tiny network of the tests: a convolution `0`, and another, `3`."""


@pytest.fixture
def settings(tmp_path):
    data = write_shard(tmp_path / "a.tar", 12)
    return tiny_settings(tmp_path / "runs", data, updates=6, save_every=3, parameter_groups=RULES)


LEARNING_RATES = {"prodigy": {"lr": 1.0}}
"""Of optimizers that find the rate themselves: `lr` is a factor on it."""


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize("optimizer", represented_by("muon", of=OPTIMIZERS.keys() - {"adamw8bit"}))
def test_a_run_with_groups_resumes_exactly_and_leaves_frozen_parameters_alone(settings, optimizer):
    given = settings | {"optimizer": optimizer} | LEARNING_RATES.get(optimizer, {})
    _, lines = train_here(given)
    halves = given | {"experiment_id": "halves"}
    train_here(halves | {"updates": 3})
    assert numbers(train_here(halves)[1]) == numbers(lines)
    for name in ("generator", "generator_ema"):
        whole, resumed = load_weights(given, name), load_weights(halves, name)
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    torch.manual_seed(given.get("seed", 0))
    first = Denoiser(make_config(TinyConfig, given)).build()["generator"].state_dict()
    assert torch.equal(load_weights(given)["3.bias"], first["3.bias"])
    assert not torch.equal(load_weights(given)["3.weight"], first["3.weight"])


@pytest.mark.integration
def test_a_run_with_other_groups_is_refused_and_frozen_parameters_are_in_no_checkpoint(settings):
    train_here(settings | {"updates": 3})
    with pytest.raises(UserError, match=r"resume with .* that were saved: the same parameter_groups"):
        train_here(settings | {"parameter_groups": [RULES[0], RULES[2]]})
    with pytest.raises(UserError, match=r"generator/3.bias is not in the checkpoint"):
        train_here(settings | {"parameter_groups": RULES[1:]})


def _train(given: dict) -> None:
    assert Denoiser(make_config(TinyConfig, given)).run() == 0


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("optimizer", represented_by("adamw", of=[one for one in OPTIMIZERS if supports_dtensor(one)]))
def test_two_sharded_processes_make_the_updates_of_one(settings, optimizer):
    given = settings | {"optimizer": optimizer, "micro_batch_size": 2, "dropout": 0.0, "updates": 3}
    given |= LEARNING_RATES.get(optimizer, {})
    _, lines = train_here(given)
    together = given | {"experiment_id": "together", "use_fsdp": True}
    launch_processes(2, _train, together)
    for line, other in zip(lines, read_metrics(together), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
    for key, tensor in load_weights(given).items():
        torch.testing.assert_close(load_weights(together)[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
