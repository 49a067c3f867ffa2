"""A run goes on exactly with the same data, whatever their files' times; other data of the same size stop it."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.warpcore.runs import load_weights, numbers, tiny_settings, train_here, write_shard
from warpcore.data import identity
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path) -> dict:
    """Of a run that stands at update 4, with the time of change of its tars long ago."""
    for number in range(2):
        path = write_shard(tmp_path / "data" / f"{number}.tar", 6, first=10 * number)
        os.utime(path, (1, 1))
    settings = tiny_settings(tmp_path / "runs", tmp_path / "data", updates=4)
    assert train_here(settings)[0] == 0
    return settings | {"updates": 8}


def as_another_process() -> None:
    """Forget what this one remembers of tars."""
    identity._of_files.clear()


def rebuild(path: Path, old: bytes = b"", new: bytes = b"") -> None:
    """Write a tar from its members again, one text in the place of another one."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.replace(old, new) if name.endswith(".txt") else content))


def test_a_run_goes_on_exactly_after_its_data_were_copied_and_moved(settings, tmp_path, caplog):
    whole = settings | {"experiment_id": "whole"}
    _, uninterrupted = train_here(whole)
    data = tmp_path / "data"
    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    before = {path.name: path.stat().st_ino for path in data.glob("*.tar")}
    shutil.move(data, tmp_path / "elsewhere")
    shutil.move(tmp_path / "copy", data)
    for name, inode in before.items():
        assert (data / name).stat().st_mtime > 1
        assert (data / name).stat().st_ino != inode
    as_another_process()
    caplog.clear()
    status, lines = train_here(settings)
    assert status == 0
    assert not [record.message for record in caplog.records if record.name.startswith("warpcore.data")]
    assert numbers(lines) == numbers(uninterrupted)
    expected = load_weights(whole)
    assert all(tensor.equal(expected[name]) for name, tensor in load_weights(settings).items())


def test_a_run_goes_on_with_a_tar_that_was_rebuilt_from_the_same_files(settings, tmp_path):
    rebuild(tmp_path / "data" / "1.tar")
    assert (tmp_path / "data" / "1.tar").stat().st_mtime > 1
    as_another_process()
    assert train_here(settings)[0] == 0


def test_a_run_stops_at_a_rebuilt_tar_in_which_a_caption_of_equal_length_changed(settings, tmp_path):
    path = tmp_path / "data" / "1.tar"
    size = path.stat().st_size
    rebuild(path, b"picture 12", b"sculptur12")
    assert path.stat().st_size == size
    as_another_process()
    with pytest.raises(UserError, match=r"1\.tar changed.*on_data_change: new_epoch"):
        train_here(settings)
    assert train_here(settings | {"on_data_change": "new_epoch"})[0] == 0
