"""A pipe, a socket, a device or a folder in the place of a file is refused by name; nothing waits for it."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.sources import calls, lines_found, mode_of_open
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.files import NotAFileError, open_plain, open_to_read, read_bytes, require_file, why_no_file
from warpcore.places import read_manifest
from warpcore.text import read_text


@pytest.fixture(autouse=True)
def impatient():
    """What waits for a pipe fails at once."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def put(kind: str, path: Path) -> Path:
    """Make something at a path that is no regular file."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        here = os.open(path.parent, os.O_RDONLY)  # a name of a socket has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    else:
        path.symlink_to("/dev/zero")
    return path


KINDS = pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device"])


@KINDS
@pytest.mark.parametrize("read", [open_to_read, read_bytes, read_text, require_file])
def test_what_is_no_regular_file_is_not_read(tmp_path, kind, read):
    with pytest.raises(NotAFileError, match=rf"/x is {kind}; a regular file is needed"):
        read(put(kind, tmp_path / "x"))


@KINDS
@pytest.mark.parametrize("mode", ["a", "a+", "w", "r+", "rb"])
def test_what_is_no_regular_file_in_a_runs_folder_is_not_opened(tmp_path, kind, mode):
    path = put(kind, tmp_path / "x")
    with pytest.raises((UserError, IsADirectoryError)) as refused:
        open_plain(path, mode)
    assert str(path) in str(refused.value)


@KINDS
def test_why_there_is_no_file_is_told(tmp_path, kind):
    assert why_no_file(put(kind, tmp_path / "x")) == f"is {kind}"
    with pytest.raises(UserError, match=rf"config file .*/x is {kind}"):
        load_config_from(tmp_path / "x")


def load_config_from(path: Path):
    from tests.warpcore.tiny import TinyConfig

    return load_config(TinyConfig, [str(path)])


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_bytes(tmp_path / "link") == b"content"
    assert [why_no_file(tmp_path / name) for name in ("file", "link", "dangling", "gone", "file/x", "a" * 300)] == [
        None, None, "is a link that leads nowhere", "does not exist", "does not exist",
        "does not exist (File name too long)",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "gone")


@KINDS
def test_a_manifest_of_a_checkpoint_that_is_no_file_is_damage(tmp_path, kind):
    put(kind, tmp_path / "manifest.json")
    assert f"manifest.json is {kind}" in read_manifest(tmp_path)


FOLDERS = ("families", "inference", "tools", "train", "warpcore")
OPENED_ELSEWHERE = {"warpcore/files.py", "tools/config_reference.py"}
"""The helper itself, and what reads a page of this repository."""
READS = re.compile(r"rt?|rb")


def reads_without_the_helper(source: str) -> list[int]:
    """The lines that open a path to read it, whatever lies there."""
    found = []
    for call, name, owner in calls(source):
        if name == "open" and owner not in ("tarfile", "Image", "os", "context"):
            wrong = READS.fullmatch(mode_of_open(call, owner)) is not None
        else:
            wrong = (name in ("read_text", "read_bytes") and owner is not None) or (owner, name) == ("os", "open")
        if wrong:
            found.append(call.lineno)
    return found


def test_every_file_is_opened_to_read_as_a_regular_one():
    wanting = lines_found(FOLDERS, reads_without_the_helper, but=OPENED_ELSEWHERE)
    assert not wanting, "open it with warpcore.files.open_to_read, read_bytes or warpcore.text.read_text"


def test_the_check_sees_what_opens_a_path():
    wrong = ["Path(a).read_text()", "a.read_bytes()", "open(a)", 'open(a, "rb")', "a.open()", 'a.open("rb")',
             "os.open(a, 0)"]  # fmt: skip
    assert reads_without_the_helper("\n".join(wrong)) == [1, 2, 3, 4, 5, 6, 7]
    right = ["read_text(a)", "read_bytes(a)", 'open(a, "wb")', 'a.open("a")', "storage.open(url)"]
    assert not reads_without_the_helper("\n".join(right))
