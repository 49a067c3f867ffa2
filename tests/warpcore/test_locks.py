"""A file system without locks holds what needs them elsewhere: runs and caches."""

import errno
import fcntl
import os

import pytest

from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore import locks
from warpcore.data.disk_cache import DiskCache


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request, monkeypatch):
    """Locks as NFS and Lustre refuse them when they are mounted without."""

    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_reported", set())


@pytest.mark.integration
def test_a_run_on_a_file_system_without_locks_warns_and_goes_on(no_locks, tmp_path, caplog):
    write_shard(tmp_path / "a.tar", 6)
    settings = tiny_settings(tmp_path, tmp_path / "a.tar", updates=1)
    assert train_here(settings)[0] == 0
    assert f"{tmp_path}/tiny: the file system has no locks" in caplog.text


def test_a_cache_of_remote_tars_on_a_file_system_without_locks_warns_once_and_goes_on(no_locks, tmp_path, caplog):
    for _ in range(2):
        DiskCache(tmp_path / "cache", 10**6, [])
    assert caplog.text.count("the file system has no locks") == 1
