"""The tars of a data set while they are written: which samples go into which tar, and their bytes."""

import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import webdataset

from families.common.features import CACHE_NAME
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import Summary, index_shard
from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.errors import UserError
from warpcore.files import naming, open_plain
from warpcore.locks import lock_file
from warpcore.outputs import check_folder

ASIDE = ".building"
"""The folder, in the one of a data set, where its tars are written first."""
_LOCK = ".lock"
_OURS = re.compile(r"\d{5,}\.tar(\.index\.parquet)?|" + "|".join(map(re.escape, (MANIFEST_NAME, CACHE_NAME))))


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError where `out` is a file, or holds something and `overwrite` is False."""
    check_folder(out, "the tars")
    if out.exists() and any(path.name != ASIDE for path in out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or give --overwrite to replace the tars in it")


def swap(aside: Path, out: Path) -> None:
    """Replace the tars of `out` by those that lie aside."""
    for path in out.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
    for path in aside.iterdir():
        if _OURS.fullmatch(path.name):
            path.replace(out / path.name)


@contextmanager
def reserved(aside: Path) -> Iterator[None]:
    """The folder that tars are written to first, empty, for one build alone; it is removed in the end, and so is the
    folder around it where that is new and nothing came into it.

    Raises:
        UserError: another process builds there.
    """
    out = aside.parent
    is_new = not out.exists()
    aside.mkdir(parents=True, exist_ok=True)
    with open_plain(aside / _LOCK, "w") as lock:
        try:
            lock_file(lock, str(out), wait=False)
        except BlockingIOError:
            raise UserError(f"{out}: another process builds a data set there; wait for it, or stop it") from None
        for path in aside.iterdir():  # of a build that was killed
            if path.name != _LOCK:
                path.unlink()
        try:
            yield
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()


class Packing:
    """How many samples go into a tar: a number of them, or until it has about `shard_size_bytes`."""

    def __init__(self, samples_per_shard: int, shard_size_bytes: int | None):
        self._samples_per_shard, self._shard_size_bytes = samples_per_shard, shard_size_bytes
        self._samples = self._bytes = 0

    def add(self, sample_bytes: int) -> bool:
        """Add a sample; whether it is the last one of its tar."""
        self._samples, self._bytes = self._samples + 1, self._bytes + sample_bytes
        by_size = self._shard_size_bytes is not None
        is_last = self._bytes >= self._shard_size_bytes if by_size else self._samples == self._samples_per_shard
        if is_last:
            self._samples = self._bytes = 0
        return is_last


def sample_bytes(key: str, sizes: Mapping[str, int]) -> int:
    """The bytes that a sample takes in a tar, headers and padding included; sizes: of its members, in bytes."""
    total = 0
    for member, size in sizes.items():
        header = tarfile.TarInfo(f"{key}.{member}").tobuf(tarfile.PAX_FORMAT, tarfile.ENCODING, "surrogateescape")
        total += len(header) + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return total


class ShardWriter:
    """Writes samples to one tar."""

    def __init__(self, out: Path, number: int):
        self.path = out / f"{number:05d}.tar"
        self._file = self.path.open("wb")
        # No times or owners: equal folders give equal bytes.
        self._tar = webdataset.TarWriter(
            self._file, user="", group="", mode=0o644, mtime=0, encoder=False, keep_meta=True
        )

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        with naming(self.path):
            for member, content in members.items():  # one by one, or they would be sorted by name, the picture behind
                self._tar.write({"__key__": key, member: content})

    def close(self) -> None:
        """Write the end of the tar, to the disk itself."""
        with naming(self.path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def indexed(self) -> tuple[Shard, Summary]:
        """The tar, now that it is written, and its index."""
        url = str(self.path.resolve())
        shard = Shard(url, *storage_for(url).stat(url))
        return shard, index_shard(shard)
