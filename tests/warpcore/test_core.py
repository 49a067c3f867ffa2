"""The engine, through a tiny use case: exact repetition, exact resuming, and what happens when things go wrong."""

import hashlib
import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
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
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore import use_case
from warpcore.config import make_config
from warpcore.core import STOPPED_EARLY
from warpcore.errors import UserError
from warpcore.pictures import read_cells

pytestmark = pytest.mark.integration


SLOWLY = {"seconds_per_micro_batch": 0.2}
"""So that a signal meets the run before its end, on a busy machine too."""


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 10)


@pytest.fixture(scope="module")
def uninterrupted(shard, tmp_path_factory) -> list[tuple]:
    """Metrics of a run that nothing disturbs, in a process of its own (one thread, as the disturbed ones)."""
    settings = tiny_settings(tmp_path_factory.mktemp("whole"), shard, validation_samples=3)
    status, output = finish(start(settings))
    assert status == 0, output
    return numbers(read_metrics(settings))


def start_with_hang_ups(handling: signal.Handlers, settings: dict) -> subprocess.Popen:
    """Start a run that inherits how SIGHUP is handled: the tests may run under `nohup`, which ignores it."""
    before = signal.signal(signal.SIGHUP, handling)
    try:
        return start(settings)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.bits
def test_runs_with_the_same_seed_are_identical_and_others_are_not(shard, tmp_path):
    first, second, other = (
        numbers(train_here(tiny_settings(tmp_path / name, shard, seed=seed))[1])
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == second
    assert first != other
    assert len(first) == 12


@pytest.mark.bits
@pytest.mark.parametrize("killed_at", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_run_killed_at_any_update_goes_on_bit_for_bit(shard, uninterrupted, tmp_path, killed_at):
    settings = tiny_settings(tmp_path, shard, validation_samples=3)
    process = start(settings | SLOWLY)
    signal_at(process, settings, killed_at, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    status, output = finish(start(settings))
    assert status == 0, output
    assert numbers(read_metrics(settings)) == uninterrupted


@pytest.mark.bits
@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_stop_signal_finishes_the_update_saves_and_asks_to_be_started_again(shard, uninterrupted, tmp_path, number):
    settings = tiny_settings(tmp_path, shard, validation_samples=3, save_every=100)
    process = start_with_hang_ups(signal.SIG_DFL, settings | SLOWLY)
    signal_at(process, settings, 3, number)
    status, output = finish(process)
    assert status == STOPPED_EARLY, output
    assert 3 <= len(read_metrics(settings)) < 12
    assert finish(start(settings))[0] == 0
    losses = [dict(line)["loss"] for line in numbers(read_metrics(settings))]
    assert losses == [dict(line)["loss"] for line in uninterrupted]


@pytest.mark.slow
def test_a_hang_up_that_is_ignored_at_the_start_as_under_nohup_does_not_stop_the_run(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, updates=40, save_every=100)
    process = start_with_hang_ups(signal.SIG_IGN, settings)
    signal_at(process, settings, 1, signal.SIGHUP)
    status, output = finish(process)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.bits
@pytest.mark.parametrize("optimizer", ["schedulefree", "muon", "adafactor", "lion", "prodigy", "came"])
def test_every_optimizer_resumes_exactly(shard, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "validation_samples": 2} | ({"lr": 1.0} if optimizer == "prodigy" else {})
    whole = tiny_settings(tmp_path / "whole", shard, **settings)
    parts = tiny_settings(tmp_path / "parts", shard, **settings)
    train_here(whole)
    train_here(parts | {"updates": 8})
    train_here(parts)
    assert numbers(read_metrics(parts)) == numbers(read_metrics(whole))


def test_accumulation_does_not_change_the_updates(shard, tmp_path):
    losses = {}
    for micro in (1, 2, 8):
        settings = tiny_settings(tmp_path / str(micro), shard, batch_size=8, micro_batch_size=micro, dropout=0.0)
        lines = train_here(settings)[1]
        losses[micro] = torch.tensor([line["raw_loss"] for line in lines])
        hashes = [line["samples_hash"] for line in lines]
        assert len(set(hashes)) == len(hashes)
        losses.setdefault("hashes", hashes)
        assert hashes == losses["hashes"]
    torch.testing.assert_close(losses[1], losses[8], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[8], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("use_fsdp", "changes"),
    [
        (False, {}),
        pytest.param(True, {"optimizer": "schedulefree"}, marks=pytest.mark.slow),
        pytest.param(True, {"dtype": "bfloat16", "optimizer": "muon"}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_updates_of_one(shard, tmp_path, use_fsdp, changes):
    """With resuming in between, from two processes to one."""
    common = {"micro_batch_size": 2, "dropout": 0.0, "validation_samples": 3, **changes}
    one = tiny_settings(tmp_path / "one", shard, **common)
    two = tiny_settings(tmp_path / "two", shard, use_fsdp=use_fsdp, **common)
    exact = 1e-5 if changes.get("dtype") != "bfloat16" else 5e-2
    train_here(one)
    launch_processes(2, _train, two | {"updates": 8})
    train_here(two)
    for ours, theirs in zip(read_metrics(two), read_metrics(one), strict=True):
        assert ours["samples_hash"] == theirs["samples_hash"]
        for name in ("loss", "raw_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=exact)
    ours, theirs = (read_metrics(settings)[3]["validation_loss_ema"] for settings in (two, one))
    assert ours == pytest.approx(theirs, abs=exact)


def _train(settings: dict) -> None:
    assert train_here(settings)[0] == 0


def test_an_average_that_begins_on_resume_begins_with_the_weights_of_then(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, ema_start_iters=None, updates=4)
    train_here(settings)
    then = load_weights(settings)
    train_here(settings | {"updates": 8, "ema_start_iters": 2, "ema_iters": 100})
    average, now = load_weights(settings, "generator_ema"), load_weights(settings)
    assert all(torch.equal(average[name], then[name]) for name in then)
    assert any(not torch.equal(now[name], then[name]) for name in then)


def test_a_run_leaves_weights_samples_and_records(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, validation_samples=3, backup_every=4, tensorboard=True)
    train_here(settings)
    folder = tmp_path / "tiny"
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["00000008", "00000012"]
    assert sorted(p.name for p in (folder / "backups").iterdir()) == ["00000004", "00000008", "00000012"]
    assert len(read_cells(folder / "samples" / "00000012.png")) > 0
    assert load_weights(settings).keys() == load_weights(settings, "generator_ema").keys()
    assert not torch.equal(load_weights(settings)["0.weight"], load_weights(settings, "generator_ema")["0.weight"])
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.bits
def test_an_update_that_is_not_finite_is_skipped_and_many_in_a_row_stop_the_run(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, break_update=6, max_nonfinite_updates=3, save_every=6, ema_iters=1)
    with pytest.raises(UserError, match="max_nonfinite_updates"):
        train_here(settings)
    lines = read_metrics(settings)
    assert [line["loss"] is None for line in lines] == [False] * 6 + [True] * 3
    repaired = tiny_settings(tmp_path, shard, save_every=6, ema_iters=1)
    assert train_here(repaired)[0] == 0
    whole = tiny_settings(tmp_path / "whole", shard, save_every=6, ema_iters=1)
    assert numbers(train_here(whole)[1]) == numbers(read_metrics(repaired))


def test_a_skipped_update_leaves_weights_and_average_alone(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, updates=6, save_every=6)
    train_here(settings)
    before = [load_weights(settings), load_weights(settings, "generator_ema")]
    train_here(settings | {"updates": 8, "break_update": 6})
    after = [load_weights(settings), load_weights(settings, "generator_ema")]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, updates=8, width=64)
    train_here(settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(UserError, match=r"save update 12 .*a full disk needs room.*\n.*update 8 is whole"):
            train_here(settings | {"updates": 12})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / "tiny" / "state").iterdir()) == ["00000004", "00000008"]
    assert train_here(settings | {"updates": 12})[0] == 0


def test_a_checkpoint_of_another_model_is_refused(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, updates=4)
    train_here(settings)
    with pytest.raises(UserError, match=r"of another model: network/generator/0.* is \(8, .* in the checkpoint"):
        train_here(settings | {"updates": 8, "width": 9})


def test_a_start_with_nothing_to_do_says_so_and_leaves_the_config_that_made_the_weights(shard, tmp_path, capfd):
    settings = tiny_settings(tmp_path, shard, updates=4)
    train_here(settings)
    config = tmp_path / "tiny" / "config.yaml"
    before = config.read_text()
    assert train_here(settings | {"updates": 3, "lr": 0.5})[0] == 0
    told = "tiny is at update 4: updates: 3 leaves nothing to do; write a larger number to train on"
    assert told in capfd.readouterr().err
    assert config.read_text() == before
    train_here(settings | {"updates": 5, "lr": 0.5})
    assert "tiny is at update 4\n" in capfd.readouterr().err
    assert "lr: 0.5" in config.read_text()


def test_edited_data_and_filters_are_refused_on_resume_or_start_a_new_epoch(tmp_path):
    data = tmp_path / "data"
    write_shard(data / "a.tar", 6)
    settings = tiny_settings(tmp_path, data, updates=4)
    train_here(settings)
    settings["updates"] = 8
    with pytest.raises(UserError, match=r"dataset_filters"):
        train_here(settings | {"dataset_filters": [["score", "lambda s: s < 5"]]})
    write_shard(data / "b.tar", 2, first=50)
    with pytest.raises(UserError, match=r"b\.tar"):
        train_here(settings)
    assert train_here(settings | {"on_data_change": "new_epoch"})[0] == 0
    assert [line["update"] for line in read_metrics(settings)] == list(range(1, 9))


def test_two_runs_cannot_write_one_experiment(shard, tmp_path):
    settings = tiny_settings(tmp_path, shard, updates=100000)
    process = start(settings)
    try:
        signal_at(process, settings, 1, signal.SIGCONT)
        with pytest.raises(UserError, match=rf"another run \(process {process.pid} "):
            train_here(settings)
    finally:
        process.kill()
        process.communicate()


def test_a_checkpoint_that_asks_for_code_is_refused(shard, tmp_path):
    import pickle

    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    settings = tiny_settings(tmp_path, shard, updates=4)
    train_here(settings)
    state, attack = tmp_path / "tiny" / "state" / "00000004", pickle.dumps(Attack())
    (state / ".metadata").write_bytes(attack)
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["files"][".metadata"] = {"bytes": len(attack), "sha256": hashlib.sha256(attack).hexdigest()}
    (state / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"asks for (posix|os)\.system"):
        train_here(settings | {"updates": 8})


def test_threads_lanes_and_groups_are_those_of_the_config(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    data = write_shard(tmp_path / "a.tar", 8)
    for keys, recipe in (({}, None), ({"num_threads": 3, "lanes": 2, "shard_group_rows": 4}, (2, 4))):
        run = Denoiser(make_config(TinyConfig, tiny_settings(tmp_path / str(len(keys)), data, batch_size=2, **keys)))
        run.setup()
        plan = run.feed.plan.fingerprint
        run.close()
        assert recipe in (None, (plan["lanes"], plan["shard_group_rows"]))
    assert threads == [3]


class Tabled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.table, self.mix = body, nn.Parameter(torch.eye(2, 3)), nn.Linear(3, 3)

    def forward(self, x):
        x = self.body(x) + self.table.mean(dim=0)[:, None, None]
        return x + self.mix(x.movedim(1, -1)).movedim(-1, 1)


class WithTable(Denoiser):
    def build(self):
        return {"generator": Tabled(super().build()["generator"])}


class OfBefore(WithTable):
    """Muon had everything of two dimensions, and checkpoints did not say what it has."""

    def make_networks(self, saved=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(use_case, "linear_weights", lambda _: None)
            super().make_networks(saved)
        self.kept = {}


def test_muon_leaves_tables_to_adamw_but_a_run_goes_on_with_the_matrices_that_it_began_with(tmp_path, shard, capsys):
    given = tiny_settings(tmp_path, shard, updates=2, save_every=1, optimizer="muon")
    train_here(given | {"experiment_id": "whole"}, OfBefore)
    train_here(given | {"experiment_id": "new"}, WithTable)
    train_here(given | {"updates": 1}, OfBefore)
    capsys.readouterr()
    train_here(given, WithTable)
    assert "optimizer: muon: this run goes on as it began, with tables among the" in capsys.readouterr().err
    whole, new, resumed = (
        load_weights(given | one) for one in ({"experiment_id": "whole"}, {"experiment_id": "new"}, {})
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not torch.equal(whole["table"], new["table"])
    train_here(given | {"experiment_id": "new", "updates": 3}, WithTable)
    assert "tables among the matrices" not in capsys.readouterr().err
