"""Checkpoints are verified before a run goes on from them; damaged ones are passed over, in words."""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tests.many_processes  # noqa: F401  (makes processes start quickly)
from benchmarks.chaos import settings_of, write_data
from benchmarks.disturbed_runs import Difference, Started, read_metrics, train
from tests.warpcore.runs import numbers, tiny_settings, train_here, write_shard
from warpcore.checkpoint import MANIFEST, CheckpointError, Checkpoints
from warpcore.errors import UserError
from warpcore.processes import Processes

pytestmark = pytest.mark.integration

ALONE = Processes(0, 1, torch.device("cpu"))
FILES = ["__0_0.distcp", ".metadata", "state.json", MANIFEST]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of the updates 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    with opened(folder) as checkpoints:
        for update in (4, 8):
            save(checkpoints, update)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@contextmanager
def opened(folder: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder, ALONE)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save(checkpoints: Checkpoints, update: int) -> None:
    tensor = torch.full((1000,), float(update))
    checkpoints.save(update, {"weight": tensor}, {"update": update}, {"generator": {"weight": tensor}}, {})
    checkpoints.wait()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_what_was_saved_is_found_and_loaded(run):
    assert sorted(path.name for path in (run / "state" / "00000008").iterdir()) == sorted(FILES)
    with opened(run) as checkpoints:
        assert checkpoints.newest() == 8
        assert checkpoints.values(8) == {"update": 8}
        tensor = torch.zeros(1000)
        checkpoints.load(8, {"weight": tensor})
    assert torch.equal(tensor, torch.full((1000,), 8.0))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(run, caplog, name, damage):
    damage(run / "state" / "00000008" / name)
    with opened(run) as checkpoints:
        assert checkpoints.newest() == 4
        # A flipped digit of the manifest's is a hash that no file has.
        assert f"update 8 is damaged ({name if (name, damage) != (MANIFEST, flip) else ''}" in caplog.text
        assert "goes on from update 4" in caplog.text
        assert sorted(path.name for path in (run / "state").iterdir()) == ["00000004", "00000008.damaged"]
        save(checkpoints, 8)
        assert checkpoints.newest() == 8


@pytest.mark.parametrize("files", [[], ["state.json"], [".metadata", "__0_0.distcp"]])
def test_a_manifest_that_leaves_files_out_is_damage(run, caplog, files):
    path = run / "state" / "00000008" / MANIFEST
    listed = json.loads(path.read_text())["files"]
    path.write_text(json.dumps({"files": {name: listed[name] for name in files}}))
    with opened(run) as checkpoints:
        assert checkpoints.newest() == 4
    assert f"update 8 is damaged ({MANIFEST} does not list" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_in_silence(run):
    flip(run / "state" / "00000004" / "state.json")
    cut(run / "state" / "00000008" / "__0_0.distcp")
    for _ in range(2):
        with (
            opened(run) as checkpoints,
            pytest.raises(CheckpointError, match="no checkpoint of this run is whole") as e,
        ):
            checkpoints.newest()
        assert "state.json is not what was written" in str(e.value)
        assert "__0_0.distcp has" in str(e.value)


def test_what_a_process_left_half_written_or_half_removed_is_no_checkpoint(run):
    state = run / "state"
    shutil.copytree(state / "00000008", state / "00000012.partial")
    with opened(run) as checkpoints:
        assert checkpoints.newest() == 8
    assert sorted(path.name for path in state.iterdir()) == ["00000004", "00000008"]


def test_an_older_checkpoint_that_cannot_be_removed_stays_and_the_save_is_whole(run, caplog):
    in_the_way = run / "state" / "00000004.partial"
    with opened(run) as checkpoints:
        in_the_way.touch()
        save(checkpoints, 12)
        assert "older checkpoints stay" in caplog.text
        assert checkpoints.newest() == 12
        assert sorted(path.name for path in in_the_way.parent.glob("*[!l]")) == ["00000004", "00000008", "00000012"]
        in_the_way.unlink()
        save(checkpoints, 16)
    assert sorted(path.name for path in in_the_way.parent.iterdir()) == ["00000012", "00000016"]


@pytest.mark.skipif(os.geteuid() != 0, reason="as root, this test becomes another user for a moment")
def test_a_folder_that_cannot_be_written_is_named_and_what_is_there_stays(saved):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders can't even be read by others
        run = Path(shutil.copytree(saved, Path(place) / "run"))
        for folder in (run, run.parent):
            folder.chmod(0o755)
        with opened(run) as checkpoints, as_nobody():
            assert checkpoints.newest() == 8
            with pytest.raises(CheckpointError, match=r"update 12 in .*Permission denied.*\n.*8 is whole") as error:
                save(checkpoints, 12)
            assert "a full disk" not in str(error.value)
            with pytest.raises(CheckpointError, match=r"checkpoint_path: cannot write to .*Permission denied"):
                Checkpoints(run, ALONE)
        with opened(run) as checkpoints:
            assert checkpoints.newest() == 8


def test_a_run_that_has_written_nothing_leaves_no_folder(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for folder in (there, tmp_path / "new" / "run", tmp_path / "begun"):
        with opened(folder):
            assert folder.is_dir()
            if folder.name == "begun":
                (folder / "config.yaml").write_text("updates: 1", encoding="utf-8")
            with pytest.raises(CheckpointError, match="is being written by another run"):
                Checkpoints(folder, ALONE)
            assert folder.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "new", "there"]
    assert not (tmp_path / "new" / "run").exists()
    with pytest.raises(UserError, match=r"no\.tar"):
        train_here(tiny_settings(tmp_path, tmp_path / "no.tar"))
    assert not (tmp_path / "tiny").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
@pytest.mark.bits
def test_two_processes_agree_on_the_newest_whole_checkpoint(tmp_path):
    """Only the second process reads the damaged file."""
    data = write_data(tmp_path / "data", 60)
    whole, damaged = (settings_of(tmp_path / name, data, updates=12, use_fsdp=True) for name in ("whole", "damaged"))
    train(whole, 2)
    train(damaged | {"updates": 8}, 2)
    flip(tmp_path / "damaged" / "run" / "state" / "00000008" / "__1_0.distcp")
    train(damaged, 2)
    told = (tmp_path / "damaged" / "log.txt").read_text()
    assert told.count("the checkpoint of update 8 is damaged (__1_0.distcp is not what was written") == 1
    assert Difference.between(damaged, whole) == Difference(0, 0.0, 0.0, 0.0)


@pytest.mark.slow
def test_a_manifest_names_the_files_of_all_processes(tmp_path):
    settings = settings_of(tmp_path, write_data(tmp_path / "data", 60), updates=4, use_fsdp=True, fsdp_shards=2)
    train(settings, 4)
    state = tmp_path / "run" / "state" / "00000004"
    listed = json.loads((state / MANIFEST).read_text())["files"]
    assert listed.keys() | {MANIFEST} == {path.name for path in state.iterdir()}
    assert {name.split("_")[2] for name in listed if name.startswith("__")} >= {"0", "1"}


@pytest.mark.bits
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Neither the clock nor the times of files say which checkpoint is the newest, or what comes next."""
    data = write_shard(tmp_path / "a.tar", 10)
    whole, jumped = (tiny_settings(tmp_path / name, data, validation_samples=3) for name in ("whole", "jumped"))
    expected = train_here(whole)[1]
    train_here(jumped | {"updates": 8})
    for number, path in enumerate(sorted((tmp_path / "jumped").rglob("*"))):
        os.utime(path, (2**31 - 1e7 * number,) * 2)  # the oldest first, and in the future
    for name in ("time", "time_ns"):
        true = getattr(time, name)
        monkeypatch.setattr(time, name, lambda true=true: true() // 2)  # half of the years since 1970
    assert numbers(train_here(jumped)[1]) == numbers(expected)


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """Saves follow each other so closely that the kill hits one."""
    settings = settings_of(tmp_path, write_data(tmp_path / "data", 60), updates=100_000, save_every=1)
    started = Started(settings, 1)
    while not (lines := read_metrics(settings)) or lines[-1]["update"] < 10:
        assert started.running, started.log.read_text()
        time.sleep(0.01)
    started.send(0, signal.SIGKILL)
    started.finish(10)
    with opened(tmp_path / "run") as checkpoints:
        assert (
            checkpoints.newest() >= lines[-1]["update"] - 2
        )  # the line comes before its save, which waits for another
    assert not list((tmp_path / "run" / "state").glob("*.damaged"))
