"""A run is saved before what may fail, and before it ends because its data can't be read: no update is lost."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.many_processes import launch_processes
from tests.warpcore.runs import numbers, read_metrics, tiny_settings, train_here, write_shard
from tests.warpcore.test_feed import spoil
from tests.warpcore.tiny import Denoiser
from warpcore.data.storage_protocol import ChangedShardError
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tmp_path) -> Path:
    write_shard(tmp_path / "held_out.tar", 3, first=50)
    return write_shard(tmp_path / "data" / "a.tar", 10)


def settings_of(data: Path, name: str, **changes) -> dict:
    held_out = str(data.parents[1] / "held_out.tar")
    return tiny_settings(data.parents[1] / name, data, validation_path=held_out, micro_batch_size=2, **changes)


def undisturbed(data: Path, **changes) -> list[tuple]:
    return numbers(train_here(settings_of(data, "undisturbed", **changes))[1])


def doing(what: Callable[[], None], update: int) -> type[Denoiser]:
    """A use case that does something in the middle of an update."""

    class Disturbed(Denoiser):
        def update_state(self, statistics):
            super().update_state(statistics)
            if self.update + 1 == update:
                what()

    return Disturbed


def saved_updates(settings: dict) -> list[int]:
    return sorted(int(path.name) for path in Path(settings["checkpoint_path"], "tiny", "state").glob("*"))


def test_a_validation_tar_that_goes_away_costs_no_update(data):
    settings, tar = settings_of(data, "run"), data.parents[1] / "held_out.tar"
    with pytest.raises(UserError, match=r"held_out\.tar is gone"):
        train_here(settings, doing(lambda: tar.rename(tar.with_suffix(".away")), update=6))
    assert saved_updates(settings) == [4, 8]
    tar.with_suffix(".away").rename(tar)
    train_here(settings)
    assert numbers(read_metrics(settings)) == undisturbed(data)
    assert (Path(settings["checkpoint_path"]) / "tiny" / "samples" / "00000008.png").exists()


class NoMemoryToValidate(Denoiser):
    def loss(self, clean, random):
        if not self.networks["generator"].training and self.update > 4:
            raise RuntimeError("out of memory")
        return super().loss(clean, random)


def test_a_validation_that_raises_costs_no_update_and_is_made_first_on_resume(data):
    settings = settings_of(data, "run")
    with pytest.raises(RuntimeError, match="out of memory"):
        train_here(settings, NoMemoryToValidate)
    assert saved_updates(settings) == [4, 8]
    assert [line["update"] for line in read_metrics(settings) if "validation_loss" in line] == [4]
    with pytest.raises(RuntimeError, match="out of memory"):
        train_here(settings, NoMemoryToValidate)
    train_here(settings)
    assert [line["update"] for line in read_metrics(settings) if "validation_loss" in line] == [4, 8, 12]
    assert numbers(read_metrics(settings)) == undisturbed(data)


def test_a_drawing_that_raises_costs_no_update_and_is_made_first_on_resume(data):
    class CannotDraw(Denoiser):
        def sample(self, held_out):
            raise RuntimeError("a fault in a script")

    settings = settings_of(data, "run")
    with pytest.raises(RuntimeError, match="a fault in a script"):
        train_here(settings, CannotDraw)
    assert saved_updates(settings) == [4]
    train_here(settings | {"updates": 5})
    assert (Path(settings["checkpoint_path"]) / "tiny" / "samples" / "00000004.png").exists()


def replaced(tar: Path) -> None:
    """As a data set that is copied again while a run reads it."""
    shutil.copy(tar, tar.with_suffix(".old"))
    write_shard(tar, 12)


def removed(tar: Path) -> None:
    tar.rename(tar.with_suffix(".old"))


@pytest.mark.parametrize(("disturb", "told"), [(replaced, "changed while it was in use"), (removed, "a\.tar is gone")])
@pytest.mark.parametrize("update", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_training_data_that_changes_ends_the_run_with_its_last_complete_update_saved(data, disturb, told, update):
    settings, before = settings_of(data, "run", ema_start_iters=7), os.stat(data)
    with pytest.raises(UserError, match=told):
        train_here(settings, doing(lambda: disturb(data), update=update))
    assert saved_updates(settings)[-1] == update
    assert [line["update"] for line in read_metrics(settings)] == list(range(1, update + 1))
    shutil.copy(data.with_suffix(".old"), data)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    train_here(settings)
    assert numbers(read_metrics(settings)) == undisturbed(data, ema_start_iters=7)


class OneProcessCannotRead(Denoiser):
    """In which the second process alone meets a fault, in its second micro-batch of update 6."""

    def setup(self):
        super().setup()
        if self.processes.rank == 1:
            self.feed.reader = replace(self.feed.reader, read_ranges=self.read_until_update_6)

    def read_until_update_6(self, url, ranges, version):
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > 11:
            raise ChangedShardError(url)
        return self.feed._read_ranges(url, ranges, version)


def _expect_end(settings: dict) -> None:
    with pytest.raises(UserError, match=r"a\.tar changed while it was in use"):
        train_here(settings, OneProcessCannotRead)


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_a_fault_that_one_process_meets_ends_all_at_the_same_saved_update(data, log_every):
    settings = settings_of(data, "run", save_every=100, log_every=log_every) | {"micro_batch_size": 1}
    launch_processes(2, _expect_end, settings)
    assert saved_updates(settings) == [5]
    launch_processes(2, train_here, settings)
    whole = settings_of(data, "whole", save_every=100) | {"micro_batch_size": 1}
    launch_processes(2, train_here, whole)
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))


def test_too_many_bad_samples_end_a_run_that_is_saved(data):
    settings = settings_of(data, "run", max_bad_samples=5, save_every=100)
    spoil(data, *range(10))
    with pytest.raises(UserError, match="max_bad_samples"):
        train_here(settings)
    assert saved_updates(settings) == [2]
    state = json.loads((Path(settings["checkpoint_path"]) / "tiny" / "state" / "00000002" / "state.json").read_text())
    assert state["feed"]["bad_samples"] == 8


def test_backups_are_kept_at_updates_that_save_every_leaves_out_and_neither_validate_nor_draw(data):
    settings = settings_of(data, "run", save_every=4, backup_every=3, keep_last=10)
    train_here(settings)
    folder = Path(settings["checkpoint_path"]) / "tiny"
    assert sorted(path.name for path in (folder / "backups").iterdir()) == [f"{n:08d}" for n in (3, 6, 9, 12)]
    assert saved_updates(settings) == [3, 4, 6, 8, 9, 12]
    assert [line["update"] for line in read_metrics(settings) if "validation_loss" in line] == [4, 8, 12]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{n:08d}.png" for n in (4, 8, 12)]
    shutil.rmtree(folder / "state" / "00000012")
    train_here(settings)  # from update 9, where nothing is to be made first
    assert [line["update"] for line in read_metrics(settings) if "validation_loss" in line] == [4, 8, 12]
    assert not (folder / "samples" / "00000009.png").exists()


def test_validation_samples_that_can_not_be_read_leave_no_number_and_a_run_that_goes_on(data):
    settings = settings_of(data, "run")
    spoil(data.parents[1] / "held_out.tar", 50, 51, 52)
    assert train_here(settings)[0] == 0
    assert [line["validation_loss"] for line in read_metrics(settings) if "validation_loss" in line] == [None] * 3
