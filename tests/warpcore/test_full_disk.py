"""A full disk, or a place that can't be written, is named by its path."""

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

from tests.warpcore.data.tars import picture
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from tools.build_dataset import main as build_dataset
from warpcore import weights
from warpcore.data import sidecars
from warpcore.data.storage import storage_for
from warpcore.errors import UserError, run_script
from warpcore.files import write_whole, writing
from warpcore.weights import write_weights


def fail(number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def message_of(main, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_full_disk_is_named_by_the_file_that_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    told = f"error: the disk that holds {tmp_path / 'info.json'}.partial is full (No space left on device). Make room"
    assert told in message_of(lambda: write_whole(tmp_path / "info.json", "{}"), capsys)

    def write_line() -> None:
        with writing(tmp_path / "metrics.jsonl", "a"):
            fail(errno.EDQUOT)()

    assert f"the disk that holds {tmp_path / 'metrics.jsonl'} is full (Disk quota" in message_of(write_line, capsys)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EACCES, "may not be read or written (Permission denied): change its permissions"),
        (errno.EROFS, "may not be read or written (Read-only file system)"),
        (errno.EFBIG, "would be larger than a file may be here (File too large): raise the limit (ulimit -f)"),
    ],
)
def test_a_place_that_refuses_what_a_tool_writes_is_named(tmp_path, monkeypatch, capsys, number, told):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(picture())
    monkeypatch.setattr("tarfile.TarFile.addfile", fail(number))
    message = message_of(lambda: build_dataset([str(tmp_path / "pictures"), str(tmp_path / "out")]), capsys)
    assert re.search(rf"error: {re.escape(str(tmp_path / 'out'))}\S* {re.escape(told)}", message)


def test_a_disk_that_is_full_for_weights_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "content", fail(errno.ENOSPC))
    told = message_of(lambda: write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)}), capsys)
    assert f"the disk that holds {tmp_path / 'w.partial'} is full" in told


def test_a_disk_that_is_full_for_a_tar_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(picture())
    (tmp_path / "pictures" / "0.txt").write_text("a cat")
    monkeypatch.setattr("tarfile.TarFile.addfile", fail(errno.ENOSPC))
    told = message_of(lambda: build_dataset([str(tmp_path / "pictures"), str(tmp_path / "out")]), capsys)
    assert f"the disk that holds {tmp_path / 'out'}" in told


@pytest.mark.integration
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_on_read_only_data_without_a_home_uses_the_temporary_folder_and_says_so(
    tmp_path, monkeypatch, caplog, number
):
    settings = read_only(tmp_path, monkeypatch, number)
    assert train_here(settings)[0] == 0
    (index,) = (tmp_path / "temporary").glob("warpcore-*/warpcore/index/*.parquet")
    told = (
        f"{os.strerror(number)}; /dev/null/home/.cache/warpcore/index: Not a directory; what belongs there is kept in"
    )
    assert f"{tmp_path / 'data'}: {told} {index.parent}" in caplog.text


@pytest.mark.integration
def test_a_run_that_can_keep_its_index_nowhere_names_every_place_in_one_message(tmp_path, monkeypatch):
    settings = read_only(tmp_path, monkeypatch, errno.EROFS)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/dev/null/temporary")
    places = rf"{tmp_path}/data: Read-only.*; /dev/null/home/.cache/.*; /dev/null/temporary/warpcore.*WARPCORE_INDEX"
    with pytest.raises(UserError, match=places):
        train_here(settings)


def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> dict:
    """Settings of a run whose data and home are read-only, for root too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(sidecars, "_reported", set())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    kind = storage_for("/").__class__
    write = kind.write

    def refuse(self, url: str, content: bytes) -> None:
        if url.startswith(str(tmp_path / "data")):
            raise OSError(number, os.strerror(number))
        write(self, url, content)

    monkeypatch.setattr(kind, "write", refuse)
    return tiny_settings(tmp_path / "runs", write_shard(tmp_path / "data" / "0.tar", 8), updates=2)
