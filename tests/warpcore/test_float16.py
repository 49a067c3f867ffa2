"""`dtype: float16` scales losses as torch.amp.GradScaler does, and its factor is part of a checkpoint."""

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
from tests.warpcore.runs import numbers, read_metrics, tiny_settings, train_here, write_shard
from warpcore import gradients, loss_scale, optim, reports
from warpcore.errors import ConfigError, UserError
from warpcore.loss_scale import LossScale

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    return write_shard(tmp_path / "a.tar", 12)


def test_the_factor_and_the_steps_are_those_of_gradscaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_UPDATES", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    ours, theirs = (nn.Parameter(torch.ones(4)) for _ in range(2))
    our_scale = LossScale(CPU, enabled=True)
    our_optimizer, their_optimizer = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in (ours, theirs))
    our_optimizer.param_groups[0]["param_names"] = ["w"]
    factors = [1.0, torch.inf, 0.5, 2.0, 3.0, 1.0, torch.nan, 1.0, 1.0, 1.0, 1.0]
    for factor in factors:
        assert our_scale.metrics()["loss_scale"] == scaler.get_scale()
        scaler.scale((theirs * factor).sum()).backward()
        scaler.unscale_(their_optimizer)
        scaler.step(their_optimizer)
        scaler.update()
        our_scale.scaled((ours * factor).sum()).backward()
        our_scale.unscale([ours])
        norm = gradients.clip_gradients([ours], None)
        finite = norm.isfinite()
        optim.step([our_optimizer], ~finite)
        our_scale.update(norm, finite)
        assert torch.equal(ours, theirs)
        ours.grad = theirs.grad = None
    assert scaler.get_scale() == 2.0**16 * 2**2 / 2**2


def test_the_factor_ends_at_its_floor_and_stays_where_an_update_is_skipped_for_another_reason():
    scale = LossScale(CPU, enabled=True)
    scale.update(torch.tensor(1.0), torch.tensor(False))
    assert scale.state() == {"scale": loss_scale.START, "good_updates": 0}
    for _ in range(40):
        scale.update(torch.tensor(torch.inf), torch.tensor(False))
    assert scale.state()["scale"] == loss_scale.FLOOR


def test_without_float16_nothing_is_scaled():
    scale, loss = LossScale(CPU, enabled=False), torch.ones(())
    assert scale.scaled(loss) is loss
    assert scale.metrics() == scale.state() == {}


@pytest.mark.integration
def test_a_run_learns_what_one_in_float32_learns_and_resumes_with_its_factor(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_UPDATES", 4)
    plain = tiny_settings(tmp_path, data, experiment_id="plain", updates=6, save_every=3)
    whole = plain | {"experiment_id": "whole", "dtype": "float16"}
    halves = whole | {"experiment_id": "halves"}
    _, expected = train_here(plain)
    _, lines = train_here(whole)
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)
    assert [line["loss_scale"] for line in lines] == [2.0**16] * 4 + [2.0**17] * 2
    train_here(halves | {"updates": 3})
    _, resumed = train_here(halves)
    assert numbers(resumed) == numbers(lines)
    assert [line["loss_scale"] for line in resumed] == [line["loss_scale"] for line in lines]
    assert all("loss_scale" not in line for line in expected)


@pytest.mark.integration
def test_a_run_in_float32_may_go_on_in_float16_and_back(data, tmp_path):
    settings = tiny_settings(tmp_path, data, updates=2, save_every=2)
    for updates, dtype in ((2, "float32"), (4, "float16"), (6, "float32")):
        status, lines = train_here(settings | {"updates": updates, "dtype": dtype})
        assert status == 0
    assert ["loss_scale" in line for line in lines] == [False, False, True, True, False, False]


@pytest.mark.integration
def test_gradients_that_overflow_skip_updates_without_ending_the_run(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loss_scale, "START", 2.0**40)
    settings = tiny_settings(tmp_path, data, updates=30, save_every=30, max_nonfinite_updates=2, dtype="float16")
    status, lines = train_here(settings)
    skipped = [line["update"] for line in lines if line["grad_norm"] is None]
    assert status == 0
    assert len(skipped) > 2
    assert skipped == list(range(1, len(skipped) + 1))
    assert lines[-1]["loss_scale"] == 2.0 ** (40 - len(skipped))
    assert "was skipped" not in capfd.readouterr().err
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.integration
def test_at_the_floor_they_count_as_ever(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 2.0**40)
    for module in (loss_scale, reports):
        monkeypatch.setattr(module, "FLOOR", 2.0**39)
    settings = tiny_settings(tmp_path, data, updates=9, max_nonfinite_updates=2, dtype="float16")
    with pytest.raises(UserError, match="2 updates in a row, up to 3,"):
        train_here(settings)
    assert [line["loss_scale"] for line in read_metrics(settings)] == [2.0**40, 2.0**39, 2.0**39]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("use_fsdp", [False, True])
def test_two_processes_make_the_updates_of_one(data, tmp_path, use_fsdp):
    alone = tiny_settings(
        tmp_path, data, experiment_id="alone", updates=4, save_every=4, dtype="float16", micro_batch_size=2
    )
    together = alone | {"experiment_id": "together", "use_fsdp": use_fsdp}
    _, expected = train_here(alone)
    launch_processes(2, train_here, together)
    for line, other in zip(read_metrics(together), expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert line["loss_scale"] == other["loss_scale"]


@pytest.mark.integration
def test_a_loss_that_is_no_number_counts_as_ever(data, tmp_path):
    settings = tiny_settings(tmp_path, data, updates=9, break_update=2, max_nonfinite_updates=2, dtype="float16")
    with pytest.raises(UserError, match="2 updates in a row"):
        train_here(settings)


def test_bfloat16_weights_are_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="weights_dtype: bfloat16 needs dtype: bfloat16"):
        train_here(tiny_settings(tmp_path, data, dtype="float16", weights_dtype="bfloat16"))
