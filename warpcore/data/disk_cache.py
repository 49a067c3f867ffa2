"""A cache of remote tars on a node's disk, shared by all processes of the node and by one run after the other.

A cached tar is a sparse file in which everything that was read stands at its own place, beside a list of what that is.
A range counts as cached when the list has it and its checksum is right: what was half written when a process or the
machine stopped is read again.

What the plan needs last makes room first. That is what it does not need at all: tars of other data sets or versions,
the least recently used first. Then, as an epoch draws every row once, it is what was drawn just now: when only tars of
the plan are left, nothing new is kept. So a cache that holds a tenth of the data saves a tenth of the requests, where
one that replaced the oldest would save next to nothing.
"""

import errno
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from warpcore.data.storage import is_remote, read_ranges
from warpcore.data.storage_protocol import Version
from warpcore.errors import UserError
from warpcore.files import open_to_change, open_to_read, read_bytes
from warpcore.locks import lock_file

RECORD = np.dtype([("offset", "<i8"), ("size", "<i8"), ("checksum", "<u8")])
FULL_SECONDS = 60
"""How long a process takes the cache to be full before it looks again."""
_BLOCK_BYTES = 4096
_DATA, _LIST = ".data", ".list"

logger = logging.getLogger(__name__)


class DiskCache:
    """`read_ranges` with a memory. Picklable; every process has its own, on one folder.

    Args:
        folder: on a local disk (where there are no locks, the limit is kept roughly).
        limit_bytes: what the files in it may take.
        needed: URL and version of every tar of the plan.

    Raises:
        UserError: the folder can't be written.
    """

    def __init__(self, folder: Path, limit_bytes: int, needed: Iterable[tuple[str, Version]]):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._count():
                pass
        except OSError as error:
            raise UserError(f"cache_path: nothing can be written to {folder} ({error.strerror})") from None
        self._needed = np.array(sorted(_number(url, version) for url, version in needed), np.uint64)
        self._full_until = 0.0

    def __call__(self, url: str, ranges: list[tuple[int, int]], version: Version | None = None) -> list[bytes]:
        """Raises what `read_ranges` raises."""
        if version is None or not is_remote(url):
            return read_ranges(url, ranges, version)
        name = f"{_number(url, version):016x}"
        found = self._read(name, ranges)
        missing = [one for one, data in zip(ranges, found, strict=True) if data is None]
        if missing:
            fetched = read_ranges(url, missing, version)
            self._keep(name, missing, fetched)
            rest = iter(fetched)
            found = [next(rest) if data is None else data for data in found]
        return found

    def _read(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes | None]:
        """The ranges that are there, None for the others."""
        try:
            content = read_bytes(self.folder / (name + _LIST))
            listed = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)
            with open_to_read(self.folder / (name + _DATA), buffering=0) as file:
                found = [_checked(file.fileno(), listed, *one) for one in ranges]
            os.utime(self.folder / (name + _LIST))  # when it was last used
        except FileNotFoundError:
            return [None] * len(ranges)
        return found

    def _keep(self, name: str, ranges: list[tuple[int, int]], blocks: list[bytes]) -> None:
        if time.monotonic() < self._full_until:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._make_room(sum(len(block) + _BLOCK_BYTES for block in blocks)):
                self._write(name, ranges, blocks)
                return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("%s: the disk is full before the cache is; nothing new is kept for now", self.folder)
        self._full_until = time.monotonic() + FULL_SECONDS

    def _write(self, name: str, ranges: list[tuple[int, int]], blocks: list[bytes]) -> None:
        with open_to_change(self.folder / (name + _DATA)) as file:
            for (offset, _), block in zip(ranges, blocks, strict=True):
                file.seek(offset)
                file.write(block)
        records = [(*one, zlib.crc32(block)) for one, block in zip(ranges, blocks, strict=True)]
        with open(self.folder / (name + _LIST), "ab", buffering=0) as file:
            if file.tell() % RECORD.itemsize:  # cut off while it was written: it would never fit again
                self._remove(name)
                return
            file.write(np.array(records, RECORD).tobytes())  # in one piece, as others append too

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes may be written, which are then counted."""
        with self._count() as count:
            if count[0] + size > self.limit_bytes:
                files = list(self._files())
                count[0] = sum(used for _, _, used in files)
                self._evict(files, count, size)
            fits = count[0] + size <= self.limit_bytes
            count[0] += size if fits else 0
        return fits

    def _evict(self, files: list[tuple[float, str, int]], count: np.ndarray, size: int) -> None:
        needed = np.isin(np.array([int(name, 16) for _, name, _ in files], np.uint64), self._needed).tolist()
        for is_needed, (_, name, used) in sorted(zip(needed, files, strict=True)):
            wanted = self.limit_bytes if is_needed else self.limit_bytes - size
            if count[0] <= wanted:
                return
            self._remove(name)
            count[0] -= used

    def _files(self) -> Iterator[tuple[float, str, int]]:
        """(time of the last use, name, bytes on the disk) of every tar."""
        for path in self.folder.glob("*" + _LIST):
            with suppress(FileNotFoundError):  # somebody else removes it
                used, data = path.stat(), path.with_suffix(_DATA).stat()
                yield used.st_mtime, path.stem, (used.st_blocks + data.st_blocks) * 512

    def _remove(self, name: str) -> None:
        for suffix in (_LIST, _DATA):
            (self.folder / (name + suffix)).unlink(missing_ok=True)

    @contextmanager
    def _count(self) -> Iterator[np.ndarray]:
        """(1,) int64: the bytes in use, to be changed by one process at a time; too many only after a crash."""
        with open_to_change(self.folder / "used_bytes", buffering=0) as file:
            lock_file(file, f"{self.folder} (cache_path)")
            count = np.frombuffer(file.read(8).ljust(8, b"\0"), np.int64).copy()
            yield count
            file.seek(0)
            file.write(count.tobytes())


def _number(url: str, version: Version) -> int:
    """64 bits that stand for a version of a tar."""
    text = f"{url}\0{version[0]}\0{version[1]}"
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def _checked(file: int, listed: np.ndarray, offset: int, size: int) -> bytes | None:
    checksums = listed["checksum"][(listed["offset"] == offset) & (listed["size"] == size)]
    if not len(checksums):
        return None
    data = os.pread(file, size, offset)
    return data if len(data) == size and zlib.crc32(data) in checksums else None
