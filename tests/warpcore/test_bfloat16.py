"""Weights kept in bfloat16: rounding is right on average, small steps add up, and runs resume exactly."""

import pytest
import torch

from tests.tiers import represented_by
from tests.warpcore.runs import load_weights, numbers, read_metrics, tiny_settings, train_here, write_shard
from warpcore import optim
from warpcore.bfloat16 import round_stochastically


def test_rounding_takes_a_neighbour_and_is_right_on_average():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(200), torch.tensor([0.0, -0.0, 1.0, -2.0, 3e38, 1e-30])])
    draws = 4000
    rounded = torch.stack([round_stochastically(values) for _ in range(draws)]).double()
    below, above = rounded.min(dim=0).values, rounded.max(dim=0).values
    nearest = values.to(torch.bfloat16)
    for neighbour in (below, above):
        distance = (neighbour - values.double()).abs()
        assert bool((distance <= 2**-7 * values.double().abs()).all())
    exact = nearest.float() == values
    assert bool((below == above)[exact].all())
    assert int((rounded != nearest.double()).any(dim=0).sum()) > 190  # it is no rounding to the nearest
    # The mean of n draws from two values d apart deviates by at most d / (2 sqrt(n)); five times that never happens.
    assert bool(((rounded.mean(dim=0) - values.double()).abs() <= 5 * (above - below) / 2 / draws**0.5).all())


def weights(dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((64, 64), 1.0, dtype=dtype))


def build(name: str, parameter: torch.Tensor, lr: float = 1e-4) -> list[torch.optim.Optimizer]:
    optimizers = optim.build_optimizers(
        name, [{"params": [parameter], "param_names": ["w"]}], lr=lr, weight_decay=0.1, linear=["w"]
    )
    optim.train_mode(optimizers)
    return optimizers


RATES = {
    "adamw": 1e-4,
    "schedulefree": 1e-4,
    "lion": 1e-4,
    "adafactor": 1e-4,
    "prodigy": 1.0,
    "muon": 1e-3,
    "came": 1e-5,
}
"""Learning rates of all optimizers but adamw8bit, whose package needs a GPU: no step reaches half a digit."""


def test_all_optimizers_are_tried():
    assert RATES.keys() == optim.OPTIMIZERS.keys() - {"adamw8bit"}


@pytest.mark.parametrize("name", RATES)
def test_steps_too_small_for_bfloat16_add_up_as_in_float32(name):
    kept, master = weights(torch.bfloat16), weights(torch.float32)
    optimizers = [build(name, kept, RATES[name]), build(name, master, RATES[name])]
    torch.manual_seed(0)
    largest, before = 0.0, master.detach().clone()
    for _ in range(60):  # the next bfloat16 number below 1 is 0.004 away
        gradient = torch.rand(64, 64)
        for parameter, optimizer in zip((kept, master), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optim.step(optimizer, torch.zeros(()))
        largest, before = max(largest, (master - before).abs().max().item()), master.detach().clone()
    moved = 1 - master.mean().item()
    assert largest < 0.002
    assert moved > 0.003
    # Prodigy's rate follows from how far so few weights have gone, rounding included.
    assert 1 - kept.float().mean().item() == pytest.approx(moved, rel=0.4 if name == "prodigy" else 0.05)


@pytest.mark.parametrize("name", RATES)
def test_a_bfloat16_weight_goes_on_exactly_where_it_was_saved(name):
    def train(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
            optim.step(optimizer, torch.zeros(()))
        return parameter

    kept, again = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer, resumed = build(name, kept, 0.01), build(name, again, 0.01)
    train(kept, optimizer, range(3))
    again.data.copy_(kept)
    optim.load_optimizer_state(resumed, *optim.optimizer_state(optimizer))
    assert torch.equal(kept, again)
    assert torch.equal(train(kept, optimizer, range(3, 6)), train(again, resumed, range(3, 6)))
    before = kept.clone()
    optim.eval_mode(optimizer)
    optim.eval_mode(resumed)
    assert torch.equal(kept, again)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, before) == (name != "schedulefree")
    optim.train_mode(optimizer)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("name", RATES)
def test_a_step_that_is_not_finite_changes_nothing(name):
    parameter = weights(torch.bfloat16)
    optimizer = build(name, parameter, RATES[name])
    for gradient, found_inf in ((torch.nan, 1.0), (1.0, 0.0), (torch.inf, 1.0)):
        before = [parameter.clone(), *(t.clone() for t in optim.optimizer_state(optimizer)[0].values())]
        parameter.grad = torch.full_like(parameter, gradient)
        optim.step(optimizer, torch.tensor(found_inf))
        after = [parameter, *optim.optimizer_state(optimizer)[0].values()]
        if found_inf and len(before) > 1:
            assert all(map(torch.equal, before, after))
        assert parameter.isfinite().all()
    assert optim.optimizer_state(optimizer)[0].get("w.step", 1) == 1


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize("optimizer", represented_by("schedulefree", of=RATES))
def test_a_run_resumes_exactly_and_writes_bfloat16(optimizer, tmp_path):
    data = write_shard(tmp_path / "a.tar", 12)
    settings = {"updates": 6, "save_every": 3, "weights_dtype": "bfloat16", "optimizer": optimizer}
    settings["lr"] = 1.0 if optimizer == "prodigy" else 1e-3
    whole = tiny_settings(tmp_path, data, experiment_id="whole", **settings)
    halves = whole | {"experiment_id": "halves"}
    train_here(whole)
    train_here(halves | {"updates": 3})
    train_here(halves)
    assert numbers(read_metrics(whole)) == numbers(read_metrics(halves))
    ours, theirs = load_weights(whole), load_weights(halves)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
