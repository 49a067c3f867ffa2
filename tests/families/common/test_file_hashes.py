import hashlib
import os

import pytest

from families.common.file_hashes import SUFFIX, sha256, sha256_of
from warpcore.errors import UserError

LONG_AGO = 1_600_000_000


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "weights.safetensors"


def write(path, content: bytes, seconds: int = LONG_AGO) -> str:
    with path.open("wb") as file:
        file.write(content)
    os.utime(path, (seconds, seconds))
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once_and_again_when_it_changed(file):
    first = write(file, b"one")
    assert sha256(file) == first
    second = write(file, b"two")  # same size, time and inode: what is remembered counts, so the file was not read
    assert sha256(file) == first
    write(file, b"two", LONG_AGO + 1)
    assert sha256(file) == second
    assert sha256(file) == second
    assert sha256(file.parent / "." / file.name) == second


def test_a_file_that_just_changed_is_not_remembered(file):
    for content in (b"one", b"two"):
        file.write_bytes(content)
        assert sha256(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", b'{"version": 1}'])
def test_damaged_notes_and_folders_that_can_not_be_written_cost_a_look(file, damage, tmp_path):
    known = write(file, b"one")
    assert sha256(file) == known
    [note] = (tmp_path / "cache").rglob(f"*{SUFFIX}")
    note.write_bytes(damage)
    assert sha256(file) == known


def test_without_a_place_to_remember_it_the_hash_is_right_and_that_is_told(file, caplog, monkeypatch):
    monkeypatch.setattr("families.common.file_hashes.cache_locations", lambda url, suffix: ["/proc/none/x"])
    known = write(file, b"one")
    assert sha256(file) == known
    assert "hashed again at the next start" in caplog.text


def test_a_folder_of_a_library_and_several_files_have_a_hash(file, tmp_path):
    first, folder = write(file, b"one"), tmp_path / "vae"
    folder.mkdir()
    assert sha256_of([file]) == first
    with pytest.raises(UserError, match="vae holds no weights"):
        sha256_of([folder])
    (folder / "config.json").write_text("{}")
    write(folder / "model.safetensors", b"one")
    assert sha256_of([folder]) == first
    both = sha256_of([file, folder])
    write(folder / "model.safetensors", b"two", LONG_AGO + 1)
    assert len({first, both, sha256_of([file, folder])}) == 3
