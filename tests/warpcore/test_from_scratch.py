"""Layers that start from scratch: once, with the same numbers on any number of processes, and never on a resume."""

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
from tests.warpcore.runs import load_weights, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.from_scratch import Start, fresh_layers, start_layers
from warpcore.rehearsal import OnShapes

FRESH = {"start_from_scratch": [{"pattern": "3.*", "method": "zeros"}, {"pattern": "0.*"}]}
"""Of the tiny network of the tests: a convolution `0`, and another, `3`."""


class Loaded(Denoiser):
    """Its file has nothing but ones."""

    def build(self):
        networks = super().build()
        for parameter in networks["generator"].parameters():
            nn.init.ones_(parameter)
        return networks


@pytest.fixture
def settings(tmp_path):
    data = write_shard(tmp_path / "a.tar", 8)
    return tiny_settings(tmp_path / "runs", data, updates=1, save_every=1, lr=1e-12, ema_start_iters=None)


@pytest.mark.integration
def test_layers_start_anew_once_and_the_run_says_so(settings, capsys):
    train_here(settings | FRESH, Loaded)
    first = load_weights(settings)
    assert first["3.weight"].abs().max() < 1e-6
    assert 0.5 * 27**-0.5 < first["0.weight"].abs().max() <= 27**-0.5 + 1e-6
    told = capsys.readouterr().err
    assert "start_from_scratch: 2 tensors, 27 parameters (3.*, zeros)" in told
    assert "start_from_scratch: 2 tensors, 224 parameters (0.*, default)" in told
    assert "generator: 4 of 4 tensors are trained, 251 of 251 parameters" in told

    train_here(settings | FRESH | {"updates": 2, "seed": 0}, Loaded)
    assert all((load_weights(settings)[key] - value).abs().max() < 1e-6 for key, value in first.items())
    told = capsys.readouterr().err
    assert "start_from_scratch: the run goes on with its own weights; at its start: start_from_scratch: 2" in told


@pytest.mark.integration
def test_a_resumed_run_resets_nothing_that_its_config_asks_for_later(settings, capsys):
    train_here(settings, Loaded)
    train_here(settings | FRESH | {"updates": 2}, Loaded)
    assert (load_weights(settings)["3.weight"] - 1).abs().max() < 1e-6
    assert "at its start: nothing was set to new values" in capsys.readouterr().err


def _train(given: dict) -> None:
    assert Loaded(make_config(TinyConfig, given)).run() == 0


@pytest.mark.slow
@pytest.mark.integration
def test_two_sharded_processes_start_with_the_numbers_of_one(settings):
    given = settings | {"start_from_scratch": [{"pattern": "*", "method": "xavier_uniform"}]}
    train_here(given, Loaded)
    together = given | {"experiment_id": "together", "use_fsdp": True}
    launch_processes(2, _train, together)
    for key, tensor in load_weights(given).items():
        torch.testing.assert_close(load_weights(together)[key], tensor, rtol=0, atol=1e-9, msg=key)
    assert load_weights(given)["3.weight"].std() > 0.1


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


class Own(Odd):
    def initialise_layer(self, name, layer):
        if name == "norm":
            nn.init.constant_(layer.weight, 2)
        elif not name:
            nn.init.constant_(layer.scale, 3)


def test_layers_begin_as_their_network_says_where_it_does():
    network = Own()
    network.other = nn.ParameterList([torch.ones(2)])
    nets = {"net": network}
    layers = fresh_layers(nets, [Start(pattern="scale"), Start(pattern="norm.*")])
    start_layers(layers, {f"net.{name}": tensor for name, tensor in network.named_parameters()}, seed=0)
    assert network.scale.tolist() == [3] * 3
    assert network.norm.weight.tolist() == [2] * 3
    assert network.norm.bias.tolist() == [0] * 3
    (layer,) = fresh_layers(nets, [Start(pattern="other.*")])
    with pytest.raises(UserError, match=r"net.other.0, and PyTorch has no default for a ParameterList: write method"):
        list(layer.values(seed=0))


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ({"pattern": "nrm.*"}, r"start_from_scratch: 'nrm.\*' matches no parameter"),
        ({"pattern": "frozen.*"}, r"'frozen.\*' matches net.frozen.weight, which is frozen"),
        ({"pattern": "scale"}, r"net.scale, and PyTorch has no default for a Odd: write method: xavier_uniform or"),
        (
            {"pattern": "scale", "method": "xavier_uniform"},
            r"neither the weight of a norm nor a bias: write m",
        ),
    ],
)
def test_what_can_not_start_from_scratch_is_one_clear_error(start, told):
    with pytest.raises(UserError, match=told):
        fresh_layers({"net": Odd()}, [Start(**start)])


def test_numbers_follow_from_the_seed_and_the_name_and_touch_nothing_else():
    def drawn(seed: int, pattern: str) -> dict[str, torch.Tensor]:
        net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        named = {f"net.{name}": parameter for name, parameter in net.named_parameters()}
        before = torch.get_rng_state()
        start_layers(fresh_layers({"net": net}, [Start(pattern=pattern)]), named, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: parameter.detach() for name, parameter in net.named_parameters()}

    both, one, other = drawn(1, "*"), drawn(1, "b.*"), drawn(2, "*")
    assert torch.equal(both["b.weight"], one["b.weight"])
    assert bool((one["a.weight"] == 1).all())
    assert not torch.equal(both["a.weight"], both["b.weight"])
    assert not torch.equal(both["a.weight"], other["a.weight"])


@pytest.mark.integration
def test_where_memory_is_counted_there_are_no_values_and_patterns_are_checked_all_the_same(settings):
    def counted(start: dict) -> int:
        with OnShapes(Denoiser, make_config(TinyConfig, settings | {"start_from_scratch": [start]}), "cuda") as shapes:
            return shapes.between_updates().weights

    assert counted({"pattern": "*"}) == 4 * 251
    with pytest.raises(UserError, match="matches no parameter"):
        counted({"pattern": "nothing.*"})
