"""The moving average of weights: against the formula written out, and swapped in and out exactly."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.golden import load_case, resolve
from tests.many_processes import run_in_two_processes
from tests.warpcore.runs import load_weights, tiny_settings, train_here, write_shard
from warpcore.config import Config, ConfigError, make_config
from warpcore.ema import EMA, PowerProfile

BETA = 0.7


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def change(net, update):
    """Stands for an optimizer step; equal on every process."""
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * update + number))
            noise = noise.to(parameter.dtype)
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            _assign(parameter, whole + noise)
        for buffer in net.buffers():
            buffer.add_(1)


def _assign(parameter, whole):
    if hasattr(parameter, "full_tensor"):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def by_the_formula(start, every, updates, skipped=()):
    net, average = make_net(), None
    for update in range(1, updates + 1):
        if update not in skipped:
            change(net, update)
        if average is None or update <= start:
            average = copies(net.state_dict()) if update <= start else copies(make_net().state_dict())
        if update > start and update % every == 0 and update not in skipped:
            for name, weight in net.state_dict().items():
                is_parameter = name in dict(net.named_parameters())
                average[name] = BETA * average[name] + (1 - BETA) * weight if is_parameter else weight.clone()
    return average


def run(net, ema, updates, skipped=()):
    for update in updates:
        if update not in skipped:
            change(net, update)
        ema.step(update, torch.tensor(update not in skipped))


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 3), (3, 1), (4, 2), (9, 1)])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_average_is_that_of_the_formula(start, every, device):
    net = make_net()
    ema = EMA(net, start=start, every=every, beta=BETA, device=device)
    run(net, ema, range(1, 9))
    expected = by_the_formula(start, every, 8)
    state = ema.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name])
    if start > 8:
        assert_identical(copies(state), copies(net.state_dict()))


@pytest.mark.integration
@pytest.mark.parametrize("every", [2, 4])
def test_at_the_end_of_a_run_the_average_moves_once_more(tmp_path, every):
    data, found = write_shard(tmp_path / "a.tar", 8), {}
    for key in (False, True):
        settings = tiny_settings(tmp_path / str(key), data, updates=6, ema_start_iters=0, ema_iters=every)
        train_here(settings | {"ema_at_end": key})
        found[key] = load_weights(settings, "generator_ema")
    weights, beta = load_weights(settings), settings["ema_beta"]
    for name, average in found[False].items():
        torch.testing.assert_close(found[True][name], beta * average + (1 - beta) * weights[name])
        assert not torch.equal(found[True][name], average)


def test_a_skipped_update_leaves_the_average_bit_for_bit():
    net = make_net()
    ema = EMA(net, start=1, every=1, beta=BETA)
    run(net, ema, range(1, 4))
    before = copies(ema.state_dict())
    change(net, 4)
    ema.step(4, torch.tensor(0.0))
    assert_identical(copies(ema.state_dict()), before)
    ema.step(5, torch.tensor([True]))
    assert not torch.equal(ema.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.bits
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_resumed_average_goes_on_bit_for_bit(cut):
    net = make_net()
    ema = EMA(net, start=3, every=1, beta=BETA)
    run(net, ema, range(1, cut + 1))
    saved, weights = copies(ema.state_dict()), copies(net.state_dict())
    run(net, ema, range(cut + 1, 8))
    resumed = make_net()
    resumed.load_state_dict(weights)
    again = EMA(resumed, start=3, every=1, beta=BETA)
    again.load_state_dict(saved, cut)
    run(resumed, again, range(cut + 1, 8))
    assert_identical(copies(again.state_dict()), copies(ema.state_dict()))


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_swapped_in_and_out_exactly(dtype):
    net = make_net().to(dtype)
    ema = EMA(net, start=1, every=1, beta=BETA)
    run(net, ema, range(1, 4))
    weights, average = copies(net.state_dict()), copies(ema.state_dict())
    assert average["0.weight"].dtype == torch.float32
    with contextlib.suppress(InterruptedError), ema.applied_to(net):
        inside = copies(net.state_dict())
        raise InterruptedError("sampling failed")
    assert_identical(inside, {name: tensor.to(weights[name].dtype) for name, tensor in average.items()})
    assert_identical(copies(net.state_dict()), weights)
    assert_identical(copies(ema.state_dict()), average)


def test_before_the_start_the_weights_are_the_average():
    net = make_net()
    ema = EMA(net, start=5, every=1, beta=BETA)
    run(net, ema, [1, 2])
    weights = copies(net.state_dict())
    with ema.applied_to(net):
        assert_identical(copies(net.state_dict()), weights)
    assert_identical(copies(ema.state_dict()), weights)


def test_a_few_named_tensors_of_a_network_can_be_averaged_alone():
    net = make_net()
    ema = EMA({"2.weight": net[2].weight}, start=0, every=1, beta=BETA)
    run(net, ema, [1, 2])
    weights, average = copies(net.state_dict()), copies(ema.state_dict())
    assert average.keys() == {"2.weight"}
    with ema.applied_to(net):
        assert_identical(copies(net.state_dict()), {**weights, **average})
    assert_identical(copies(net.state_dict()), weights)


def test_the_average_of_another_network_is_refused():
    ema = EMA(make_net(), start=0, every=1, beta=BETA)
    tensors = ema.state_dict()
    with pytest.raises(ValueError, match=r"the network lacks 'other'"):
        ema.load_state_dict({**tensors, "other": torch.zeros(1)}, 3)
    with pytest.raises(ValueError, match=r"'0.weight' is \(5, 4\)"):
        ema.load_state_dict({**tensors, "0.weight": torch.zeros(5, 4)}, 3)
    with pytest.raises(ValueError, match="ema_iters >= 1"):
        EMA(make_net(), start=0, every=0, beta=BETA)


def _sharded_run() -> None:
    net = make_net()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    net.eval()
    ema = EMA(net, start=2, every=1, beta=BETA)
    run(net, ema, range(1, 5), skipped=[4])
    expected = by_the_formula(2, 1, 4, skipped=[4])
    for name, tensor in ema.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        torch.testing.assert_close(whole, expected[name])
    single, x = make_net().eval(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    weights = copies(net.state_dict())
    with torch.no_grad():
        outside = net(x)
        single.load_state_dict(expected)
        with ema.applied_to(net):
            torch.testing.assert_close(net(x), single(x))
        # The forward pass left gathered weights in the root: those of the average must not stay behind.
        assert torch.equal(net(x), outside)
    net.reshard()
    assert_identical(copies(net.state_dict()), weights)


@pytest.mark.integration
@pytest.mark.bits
def test_sharded_weights_are_averaged_and_swapped_like_whole_ones():
    run_in_two_processes(_sharded_run)


GOLDEN, GOLDEN_TENSORS = load_case("cosmos/ema")


@pytest.mark.parametrize("row", GOLDEN["table"], ids=lambda row: f"{row['rate']} after {row['iteration_shift']}")
def test_golden_shares_of_the_power_profile(row):
    profile = PowerProfile(row["rate"], row["iteration_shift"])
    assert profile.exponent == pytest.approx(row["exponent"], rel=1e-9)
    for iteration, beta in row["beta"].items():  # the first update has iteration 0
        assert profile.beta(int(iteration) + 1) == pytest.approx(beta, rel=1e-9)


@torch.no_grad()
def test_golden_averages_of_the_power_profile():
    case = GOLDEN["updates"]
    net = nn.Module()
    for name, start in zip(("weight", "bias"), resolve(case["start"], GOLDEN_TENSORS), strict=True):
        setattr(net, name, nn.Parameter(start.clone()))
    ema = EMA(net, start=0, every=1, beta=PowerProfile(case["rate"], case["iteration_shift"]))
    for step in case["steps"]:
        for name, weights in resolve(step["weights"], GOLDEN_TENSORS).items():
            getattr(net, name).copy_(weights)
        ema.step(step["iteration"] + 1)
        for name, average in resolve(step["average"], GOLDEN_TENSORS).items():
            torch.testing.assert_close(ema.state_dict()[name], average, rtol=0, atol=case["suggested_atol"])


def test_the_power_profile_spreads_over_the_stated_part_of_the_run_however_often_it_moves():
    for rate, every in ((0.05, 1), (0.1, 1), (0.1, 4), (0.28, 10)):
        profile, updates = PowerProfile(rate), range(every, 4001, every)
        shares = torch.zeros(0, dtype=torch.float64)
        for update in updates:
            beta = profile.beta(update, every)
            shares = torch.cat([beta * shares, torch.tensor([1 - beta], dtype=torch.float64)])
        times = torch.tensor(updates, dtype=torch.float64) / 4000
        mean = (shares * times).sum()
        assert shares.sum() == pytest.approx(1)
        assert (shares * (times - mean) ** 2).sum().sqrt().item() == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_profile": "power"}, "ema_profile: power needs ema_start_iters: write 0"),
        ({"ema_rate": 0.2, "ema_start_iters": 0}, "ema_rate: only ema_profile: power reads this"),
        (
            {"ema_profile": "power", "ema_start_iters": 0, "ema_beta": 0.9},
            "ema_beta: only ema_profile: constant reads",
        ),
        ({"ema_profile": "power", "ema_start_iters": 0, "ema_rate": 0.4}, "ema_rate"),
    ],
)
def test_keys_of_the_other_profile_are_one_clear_error(changes, message):
    given = {"experiment_id": "a", "checkpoint_path": "b", "updates": 9, "batch_size": 8, "webdataset_path": "c.tar"}
    with pytest.raises(ConfigError) as error:
        make_config(Config, given | changes)
    assert message in str(error.value)


@pytest.mark.bits
@pytest.mark.integration
def test_a_run_with_the_power_profile_resumes_exactly(tmp_path):
    data = write_shard(tmp_path / "a.tar", 8)
    given = {"updates": 6, "ema_profile": "power", "ema_rate": 0.2, "ema_iteration_shift": 2, "ema_start_iters": 0}
    whole, halves = (tiny_settings(tmp_path / name, data, **given) for name in ("whole", "halves"))
    for settings in (whole, halves):
        del settings["ema_beta"]
    train_here(whole)
    train_here(halves | {"updates": 3})
    train_here(halves)
    average = load_weights(whole, "generator_ema")
    assert_identical(load_weights(halves, "generator_ema"), average)
    assert not torch.equal(average["0.weight"], load_weights(whole)["0.weight"])
