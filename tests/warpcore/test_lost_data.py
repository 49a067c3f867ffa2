"""Data that go away, or turn into something else, while a run uses them end it with one clear message."""

import os
import shutil
from pathlib import Path

import pytest

from tests.warpcore.runs import finish, read_metrics, signal_at, start, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser
from warpcore.data import storage
from warpcore.data.catalog import open_catalog
from warpcore.data.index import INDEX_SUFFIX, read_rows
from warpcore.data.shards import resolve_sources
from warpcore.data.storage_protocol import LostShardError, ReadFaultError
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


class Meddler(Denoiser):
    """After some updates, something happens to the data, once."""

    meddlers: list = []

    def encode(self, batch, random):
        if batch.number == 2 and self.meddlers:
            self.meddlers.pop()()
        return super().encode(batch, random)


def end_of_run(tmp_path: Path, meddle, changes=()) -> UserError:
    settings = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "data" / "a.tar", 8), **dict(changes))
    Meddler.meddlers = [lambda: meddle(tmp_path / "data")]
    with pytest.raises(UserError) as ended:
        train_here(settings, Meddler)
    assert 2 <= read_metrics(settings)[-1]["update"] < 12, "what was trained before that is kept"
    return ended.value


def delete(folder: Path) -> None:
    (folder / "a.tar").unlink()


def delete_all(folder: Path) -> None:
    shutil.rmtree(folder)


def put_a_pipe(folder: Path) -> None:
    (folder / "a.tar").unlink()
    os.mkfifo(folder / "a.tar")


def put_a_folder(folder: Path) -> None:
    (folder / "a.tar").unlink()
    (folder / "a.tar").mkdir()


@pytest.mark.parametrize("meddle", [delete, delete_all])
def test_a_tar_that_is_deleted_during_a_run_is_named(tmp_path, meddle):
    error = end_of_run(tmp_path, meddle)
    assert isinstance(error, LostShardError)
    assert f"{tmp_path}/data/a.tar is gone: it was deleted or moved while it was in use" in str(error)


@pytest.mark.parametrize(("meddle", "found"), [(put_a_pipe, "is a pipe"), (put_a_folder, "is a folder")])
def test_what_takes_a_tars_place_during_a_run_is_named(tmp_path, meddle, found):
    assert f"a.tar {found}; a regular file is needed" in str(end_of_run(tmp_path, meddle))


def test_a_disk_that_fails_for_good_during_a_run_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    def fail(folder: Path) -> None:
        def refuse(self, *arguments):
            raise OSError(116, "Stale file handle")

        monkeypatch.setattr(storage.LocalStorage, "read_ranges", refuse)

    error = end_of_run(tmp_path, fail)
    assert isinstance(error, ReadFaultError)
    assert "a.tar can't be read (Stale file handle): look after its disk or mount" in str(error)


@pytest.mark.parametrize("with_index", [False, True])
def test_a_tar_that_goes_before_its_index_is_read_is_named(tmp_path, with_index):
    tar = write_shard(tmp_path / "data" / "a.tar", 8)
    catalog = open_catalog(resolve_sources(str(tar)))
    if with_index:
        Path(f"{tar}{INDEX_SUFFIX}").write_bytes(b"damaged")
    else:
        Path(f"{tar}{INDEX_SUFFIX}").unlink()
    tar.unlink()
    with pytest.raises(LostShardError, match=r"a\.tar is gone"):
        read_rows(catalog.shard(0))


@pytest.mark.slow  # starting processes; what they say is that of the tests above
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_script_whose_tar_is_deleted_ends_with_one_line_and_exit_code_2(tmp_path, num_workers):
    settings = tiny_settings(
        tmp_path / "runs", write_shard(tmp_path / "data" / "a.tar", 8), updates=2000, num_workers=num_workers,
        seconds_per_micro_batch=0.05, save_every=1000,
    )  # fmt: skip
    process = start(settings)
    signal_at(process, settings, 2, 0)
    (tmp_path / "data" / "a.tar").unlink()
    code, output = finish(process)
    assert code == 2, output
    assert "Traceback" not in output
    assert f"error: {tmp_path}/data/a.tar is gone: it was deleted or moved while it was in use" in output
