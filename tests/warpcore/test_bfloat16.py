"""Weights kept in bfloat16: rounding is right on average, small steps add up, and runs resume exactly."""

import pytest
import torch

from tests.warpcore.runs import load_weights, numbers, read_metrics, tiny_settings, train_here, write_shard
from warpcore import optim
from warpcore.bfloat16 import round_stochastically
from warpcore.config import ConfigError
from warpcore.errors import UserError


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


def adamw(parameter: torch.Tensor, **settings) -> list[torch.optim.Optimizer]:
    groups = [{"params": [parameter], "param_names": ["w"]}]
    return optim.build_optimizers("adamw", groups, **{"lr": 1e-4, "weight_decay": 0.1} | settings)


def test_steps_too_small_for_bfloat16_add_up_as_in_float32():
    kept, master = weights(torch.bfloat16), weights(torch.float32)
    optimizers = [adamw(kept), adamw(master)]
    torch.manual_seed(0)
    for _ in range(50):  # 50 steps of 1e-4, where the next bfloat16 number below 1 is 0.004 away
        gradient = torch.rand(64, 64)
        for parameter, optimizer in zip((kept, master), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optim.step(optimizer, torch.zeros(()))
    moved = 1 - master.mean().item()
    assert moved > 0.004
    assert 1 - kept.float().mean().item() == pytest.approx(moved, rel=0.05)


def test_a_step_that_is_not_finite_changes_nothing():
    parameter = weights(torch.bfloat16)
    optimizer = adamw(parameter)
    for gradient, found_inf in ((torch.nan, 1.0), (1.0, 0.0), (torch.inf, 1.0)):
        before = [parameter.clone(), *(t.clone() for t in optim.optimizer_state(optimizer)[0].values())]
        parameter.grad = torch.full_like(parameter, gradient)
        optim.step(optimizer, torch.tensor(found_inf))
        after = [parameter, *optim.optimizer_state(optimizer)[0].values()]
        if found_inf and len(before) > 1:
            assert all(map(torch.equal, before, after))
        assert parameter.isfinite().all()
    assert optim.optimizer_state(optimizer)[0]["w.step"] == 1
    assert not torch.equal(parameter, torch.ones_like(parameter))


@pytest.mark.integration
@pytest.mark.bits
def test_a_run_resumes_exactly_and_writes_bfloat16(tmp_path):
    data = write_shard(tmp_path / "a.tar", 12)
    whole = tiny_settings(tmp_path, data, experiment_id="whole", updates=6, save_every=3, weights_dtype="bfloat16")
    halves = whole | {"experiment_id": "halves"}
    train_here(whole)
    train_here(halves | {"updates": 3})
    train_here(halves)
    assert numbers(read_metrics(whole)) == numbers(read_metrics(halves))
    ours, theirs = load_weights(whole), load_weights(halves)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.integration
def test_what_cannot_be_says_so(tmp_path):
    data = write_shard(tmp_path / "a.tar", 4)
    with pytest.raises(ConfigError, match=r"weights_dtype: bfloat16 needs .* optimizer: adamw"):
        train_here(tiny_settings(tmp_path, data, weights_dtype="bfloat16", optimizer="muon"))
    parameter = weights(torch.bfloat16)
    with pytest.raises(UserError, match="adafactor would round away"):
        optim.build_optimizers("adafactor", [{"params": [parameter], "param_names": ["w"]}], lr=1.0)
