"""The tars of a data set while they are written: which samples go into which tar, and their bytes."""

import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset

from families.common.features import CACHE_NAME
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import Summary, index_shard
from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.errors import UserError
from warpcore.files import naming, open_plain, write_whole
from warpcore.locks import lock_file
from warpcore.outputs import check_folder
from warpcore.safe_json import read_object

ASIDE = ".building"
"""The folder, in the one of a data set, where its tars are written first."""
_OURS = re.compile(r"\d{5,}\.tar(\.index\.parquet)?|" + "|".join(map(re.escape, (MANIFEST_NAME, CACHE_NAME))))
_LOCK, _SWAP = ".lock", ".swap.json"

logger = logging.getLogger(__name__)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError where `out` is a file, or holds something and `overwrite` is False.

    A swap there that was interrupted is finished first; not through a link, which would take another folder's tars.
    """
    check_folder(out, "the tars")
    if (out / ASIDE).is_symlink():
        raise UserError(f"{out / ASIDE} is a link, and tars are put together in a folder of that name: remove it")
    _finish_swap(out / ASIDE)
    if out.exists() and any(path.name != ASIDE for path in out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or give --overwrite to replace the tars in it")


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
    with _locked(aside):
        for path in aside.iterdir():  # of a build that was killed
            if path.name != _LOCK:
                path.unlink()
        try:
            yield
        finally:
            if not (aside / _SWAP).exists():  # else the next start goes on with it
                shutil.rmtree(aside, ignore_errors=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()


@contextmanager
def _locked(aside: Path) -> Iterator[None]:
    with open_plain(aside / _LOCK, "w") as lock:
        try:
            lock_file(lock, str(aside.parent), wait=False)
        except BlockingIOError:
            raise UserError(
                f"{aside.parent}: another process builds a data set there; wait for it, or stop it"
            ) from None
        yield


def swap(aside: Path) -> None:
    """Replace the tars in the folder around `aside` by those that lie there, all of them.

    What is to be done is written down first. Where it is interrupted, the next start does the rest.
    """
    new = sorted(path.name for path in aside.iterdir() if _OURS.fullmatch(path.name))
    old = sorted(path.name for path in aside.parent.iterdir() if _OURS.fullmatch(path.name))
    write_whole(aside / _SWAP, json.dumps({"new": new, "old": [name for name in old if name not in new]}))
    _go_on(aside)


def _finish_swap(aside: Path) -> None:
    """Go on with a swap that was interrupted.

    Raises:
        UserError: another process builds there, or what was to be done can't be read.
    """
    if (aside / _SWAP).exists():
        with _locked(aside):
            if (aside / _SWAP).exists():
                _go_on(aside)
                shutil.rmtree(aside)
                logger.warning("%s: the data set of an earlier start, which was interrupted, is whole", aside.parent)


def _go_on(aside: Path) -> None:
    todo = read_object(aside / _SWAP, f"{aside / _SWAP}")
    new, old = (todo.get(kind) for kind in ("new", "old"))
    if not all(isinstance(names, list) and all(map(_is_ours, names)) for names in (new, old)):
        raise UserError(f"{aside / _SWAP} names files that no build writes: remove {aside}, and build again")
    for name in new:
        if (aside / name).exists():
            os.replace(aside / name, aside.parent / name)
    for name in old:
        (aside.parent / name).unlink(missing_ok=True)
    (aside / _SWAP).unlink()


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and _OURS.fullmatch(name) is not None


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
