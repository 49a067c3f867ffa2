"""A copy of the old files, as a user has them, in the present folder."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.legacy import old_cascade

HERE = Path(__file__).parent


@pytest.fixture
def old_files(tmp_path, monkeypatch) -> Path:
    """The folder with the old files, which the test runs in; `mini` is their cascade."""
    folder = tmp_path / "old"
    with tarfile.open(HERE / "files.tar.xz") as tar:
        tar.extractall(folder, filter="tar")
    for path, time_ns in json.loads((HERE / "times.json").read_text()).items():
        os.utime(folder / path, ns=(time_ns, time_ns))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setitem(old_cascade.versions.VERSIONS, "mini", old_cascade.SIZES)
    old_cascade.write_bpe_tower()
    return folder
