"""The tars of a data set while they are written: which samples go into which tar, and their bytes."""

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import webdataset

from warpcore.data.index import Summary, index_shard
from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.files import naming


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
