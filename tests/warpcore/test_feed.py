"""What the engine does with bad samples: named, counted in global order, and too many of them stop the run."""

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from tests.many_processes import launch_processes
from tests.warpcore.runs import (
    finish,
    load_weights,
    numbers,
    read_metrics,
    start,
    tiny_settings,
    torchrun,
    train_here,
    write_shard,
)
from warpcore.data import storage
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


def spoil(shard: Path, *numbers: int) -> None:
    """Make pictures undecodable behind their header, where an index cannot see it."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            if member.name in [f"{number:05d}.png" for number in numbers]:
                data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            tar.addfile(member, io.BytesIO(data))


def test_a_bad_picture_is_named_and_the_run_goes_on(tmp_path, capfd):
    spoil(write_shard(tmp_path / "a.tar", 10), 3)
    status, lines = train_here(tiny_settings(tmp_path, tmp_path / "a.tar", num_workers=0))
    assert status == 0
    assert len(lines) == 12
    assert "bad sample" in (told := capfd.readouterr().err)
    assert "a.tar/00003.png" in told


def test_an_update_of_which_nothing_can_be_read_changes_nothing_and_says_so(tmp_path, capfd):
    spoil(write_shard(tmp_path / "a.tar", 10), 3)
    settings = tiny_settings(tmp_path, tmp_path / "a.tar", batch_size=1, updates=10, max_nonfinite_updates=1)
    _, lines = train_here(settings)
    (unread,) = [line["update"] for line in lines if line["loss"] is None]  # in JSON, null
    assert f"update {unread} was skipped: none of its samples could be read" in capfd.readouterr().err
    assert [line["update"] for line in lines if line["grad_norm"] == 0] == [unread]
    runs = [settings | {"experiment_id": str(updates), "updates": updates} for updates in (unread - 1, unread)]
    before, after = ({train_here(run)[0]: load_weights(run)}[0] for run in runs)
    assert all((after[name] == one).all() for name, one in before.items())


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_bad_pictures_in_a_row_stop_all_processes_at_the_same_update(tmp_path, num_processes):
    spoil(write_shard(tmp_path / "a.tar", 8), *range(8))
    settings = tiny_settings(tmp_path, tmp_path / "a.tar", micro_batch_size=2, max_bad_samples=6)
    if num_processes == 1:
        with pytest.raises(UserError, match=r"6 samples in a row could not be read \(max_bad_samples\).*a\.tar/0000"):
            train_here(settings)
    else:
        status, output = finish(start(settings, launcher=torchrun(2)))
        assert status != 0
        assert "6 samples in a row could not be read" in output
    assert len(read_metrics(settings)) == 2


@pytest.mark.parametrize("what", ["pictures", "captions"])
def test_a_run_that_could_read_none_of_its_samples_ends_with_an_error(tmp_path, what):
    data = write_shard(tmp_path / "a.tar", 8)
    if what == "pictures":
        spoil(data, *range(8))
    else:
        data.write_bytes(data.read_bytes().replace(b"picture ", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"))
    settings = tiny_settings(tmp_path, data, updates=1)
    with pytest.raises(
        UserError, match=r"none of the 4 samples of this run could be read.*The last one is .*a\.tar/0000"
    ):
        train_here(settings)
    assert len(read_metrics(settings)) == 1


def test_a_bad_validation_picture_counts_nowhere(tmp_path, capfd):
    write_shard(tmp_path / "a.tar", 8)
    write_shard(tmp_path / "whole" / "b.tar", 2, first=20)
    spoil(write_shard(tmp_path / "spoiled" / "b.tar", 3, first=20), 22)

    def validation_loss(name: str) -> float:
        settings = {"validation_path": str(tmp_path / name / "b.tar"), "updates": 1, "dropout": 0.0}
        return train_here(tiny_settings(tmp_path / name, tmp_path / "a.tar", **settings))[1][-1]["validation_loss"]

    # The noise of a sample belongs to its row, so the two readable ones weigh the same in both.
    assert validation_loss("spoiled") == pytest.approx(validation_loss("whole"), rel=1e-6)
    assert "bad validation sample" in capfd.readouterr().err


def train_on_two_machines(settings: dict) -> None:
    """The second process is on a machine whose copies of the tars have other times of change."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(socket, "gethostname", lambda: "second")
            patch.setattr(storage, "_size_and_etag", lambda status: (status.st_size, f"copy-{status.st_mtime_ns}"))
        train_here(settings)


@pytest.mark.slow
def test_machines_with_copies_of_their_own_train_validate_draw_and_resume_together(tmp_path):
    held_out = str(write_shard(tmp_path / "held_out.tar", 3, first=50))
    data, together = write_shard(tmp_path / "a.tar", 10), []
    for name, validation, run in [
        ("held_out", held_out, train_on_two_machines),
        ("drawn", None, train_on_two_machines),
        ("one", None, train_here),
    ]:
        settings = tiny_settings(tmp_path / name, data, validation_path=validation, save_every=2)
        for updates in (4, 6):
            launch_processes(2, run, settings | {"updates": updates})
        assert (tmp_path / name / "tiny" / "samples" / "00000006.png").exists()
        together.append(numbers(read_metrics(settings)))
    assert together[1] == together[2]
