"""A full disk, or a place that can't be written, is named by its path."""

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from families.common.family import ExportFormat
from tests.warpcore.data.tars import picture
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from tools import export
from tools.build_dataset import main as build_dataset
from warpcore import weights
from warpcore.data import sidecars
from warpcore.data.storage import storage_for
from warpcore.errors import UserError, run_script
from warpcore.files import write_whole, writing
from warpcore.pytorch_files import write_pytorch_file
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


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more bytes than that into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["text.json", "w.safetensors", "w.pt"])
def test_what_the_disk_refuses_in_the_middle_is_told_and_leaves_nothing(tmp_path, capsys, name):
    write = {"text.json": lambda: write_whole(tmp_path / name, "x" * 3_000_000)}.get(name) or (
        lambda: {"w.pt": write_pytorch_file, "w.safetensors": write_weights}[name](tmp_path / name, tensors)
    )
    tensors = {part: torch.zeros(100_000) for part in "abcdef"}
    with files_of_at_most(1_000_000):
        told = message_of(write, capsys)
    assert re.search(r"error: \S+\.partial would be larger than a file may be here .*ulimit -f", told)
    assert list(tmp_path.iterdir()) == []
    write()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("was_there", [False, True])
def test_an_export_of_which_a_part_was_refused_can_be_started_again(tmp_path, monkeypatch, capsys, was_there):
    target, number = tmp_path / "exported", [errno.ENOSPC]

    def write(source: Path, target: Path, arguments: list[str]) -> None:
        write_whole(made(target / "unet") / "config.json", "{}")
        if number:
            fail(number.pop())()

    def made(folder: Path) -> Path:
        folder.mkdir(parents=True)
        return folder

    if was_there:
        target.mkdir()
    monkeypatch.setattr(export, "export_format", lambda *_: ExportFormat("folder", "", "", write, writes_folder=True))
    monkeypatch.setattr(export, "export_formats", lambda: ["folder"])
    monkeypatch.setattr("sys.argv", ["export.py", "folder", str(tmp_path), str(target)])
    assert "start the same command again" in message_of(export.main, capsys)
    assert list(tmp_path.rglob("*")) == ([target] if was_there else [])
    export.main()
    assert (target / "unet" / "config.json").is_file()


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


@pytest.mark.integration
def test_a_checkpoint_that_the_disk_refuses_is_told_by_that_and_the_run_goes_on_later(tmp_path):
    settings = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 8), updates=2, save_every=2)
    with files_of_at_most(6_000), pytest.raises(UserError, match=r"could not save update 2 in .*File too large"):
        train_here(settings)
    left = [path.name for path in (tmp_path / "runs").rglob("*") if path.suffix in (".partial", ".safetensors")]
    assert left == []
    assert train_here(settings)[0] == 0
