"""S3 as a place that holds tars: `s3://bucket/key`, the key as it is, without percent-encoding."""

import difflib
import io
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import BinaryIO

from warpcore.data import s3_requests
from warpcore.data.globs import matching
from warpcore.data.s3_listing import list_tars
from warpcore.data.s3_requests import ask, bare_etag, split
from warpcore.data.storage_protocol import ChangedShardError, StorageError, Version

COALESCED_BYTES = 64 << 10
"""Ranges with no more than this between them are one request: the members of a sample, mostly."""
WHOLE_BYTES = 16 << 20
"""An object that is no larger is opened by reading all of it: indexes."""
LEAST_AHEAD_BYTES, MOST_AHEAD_BYTES = 512 << 10, 16 << 20
"""How much of a larger one is read at a time: less while it is read here and there, more while from start to end."""
MOST_HEADS = 16
"""Of more objects than this, a listing tells the state more quickly than a request for each."""


class S3Storage:
    """Objects of buckets; a folder is a prefix that ends with a slash."""

    def tars(self, folder: str) -> list[tuple[str, int, str]]:
        bucket, key = split(folder)
        return sorted(one for one in list_tars(bucket, _as_folder(key)) if not _is_hidden(one[0], folder))

    def glob(self, pattern: str) -> list[tuple[str, int, str]]:
        bucket, key = split(pattern)
        literal = re.split(r"[*?\[]", key)[0]
        folder = f"s3://{bucket}/{literal.rpartition('/')[0]}"
        listed = {split(one[0])[1]: one for one in list_tars(bucket, literal)}
        found = sorted(listed[key] for key in matching(listed, key))
        return [one for one in found if "/." in pattern or not _is_hidden(one[0], folder)]

    def is_folder(self, url: str) -> bool:
        key = split(url)[1]
        if key.endswith(".tar"):
            return False
        return "Contents" in ask(url, "list_objects_v2", Prefix=_as_folder(key), MaxKeys=1)

    def stat(self, url: str) -> tuple[int, str]:
        found = ask(url, "head_object", Key=split(url)[1])
        if found.get("ContentLength", -1) < 0:
            raise StorageError(f"{url}: the endpoint does not say how large it is")
        return found["ContentLength"], bare_etag(found.get("ETag"))

    def stats(self, urls: Sequence[str]) -> dict[str, tuple[int, str]]:
        objects = [url for url in urls if split(url)[1] and not url.endswith("/")]
        if len(objects) > MOST_HEADS and len({split(url)[0] for url in objects}) == 1:
            bucket, prefix = split(os.path.commonprefix(objects))  # noqa: RUF071  (characters are what is meant)
            wanted = set(objects)
            return {url: (size, etag) for url, size, etag in list_tars(bucket, prefix) if url in wanted}
        found = s3_requests.pool().map(self._stat_or_none, objects)
        return {url: state for url, state in zip(objects, found, strict=True) if state}

    def _stat_or_none(self, url: str) -> tuple[int, str] | None:
        try:
            return self.stat(url)
        except FileNotFoundError:
            return None

    def near(self, url: str) -> list[str]:
        bucket, key = split(url.rstrip("/"))
        while key:
            folder, _, name = key.rpartition("/")
            prefix = folder and folder + "/"
            page = ask(url, "list_objects_v2", Prefix=prefix, Delimiter="/")
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
            if keys:
                names = {one.removeprefix(prefix): f"s3://{bucket}/{one}" for one in keys}
                return [names[near] for near in difflib.get_close_matches(name, names, n=3, cutoff=0.5)]
            key = folder  # which may itself be what is misspelt
        return []

    def open(self, url: str) -> BinaryIO:
        data, version = s3_requests.get(url, 0, LEAST_AHEAD_BYTES)
        if len(data) < version[0] <= WHOLE_BYTES:
            (rest,) = self.read_ranges(url, [(len(data), version[0] - len(data))], version)
            data += rest
        if len(data) == version[0]:
            return io.BytesIO(data)
        return io.BufferedReader(_ObjectFile(self, url, version, data))

    def write(self, url: str, content: bytes) -> None:
        s3_requests.put(url, content)

    def read_ranges(self, url: str, ranges: list[tuple[int, int]], version: Version | None = None) -> list[bytes]:
        spans, step, pool = _spans(ranges), s3_requests.REQUEST_BYTES, s3_requests.pool()
        requests = [
            [
                pool.submit(s3_requests.get, url, part, min(part + step, stop), version)
                for part in range(start, stop, step)
            ]
            for start, stop in spans
        ]
        blocks = [b"".join([part.result()[0] for part in parts]) for parts in requests]
        if any(len(block) < stop - start for block, (start, stop) in zip(blocks, spans, strict=True)):
            raise ChangedShardError(url)  # it ends before that
        starts = [start for start, _ in spans]
        found = []
        for offset, size in ranges:
            place = bisect_right(starts, offset) - 1
            found.append(blocks[place][offset - starts[place] :][:size] if size else b"")
        return found


class _ObjectFile(io.RawIOBase):
    """A large object as a seekable file."""

    def __init__(self, storage: S3Storage, url: str, version: Version, start: bytes):
        self._storage, self._url, self._version = storage, url, version
        self._block, self._block_start, self._position = start, 0, 0
        self._ahead = LEAST_AHEAD_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, position + (0, self._position, self._version[0])[whence])
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        if self._position >= self._version[0]:
            return 0
        if not 0 <= self._position - self._block_start < len(self._block):
            self._fetch()
        place = self._position - self._block_start
        piece = self._block[place : place + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self) -> None:
        skipped = self._position - self._block_start - len(self._block)
        reads_on = 0 <= skipped < self._ahead
        self._ahead = min(2 * self._ahead, MOST_AHEAD_BYTES) if reads_on else LEAST_AHEAD_BYTES
        size = min(self._ahead, self._version[0] - self._position)
        (self._block,) = self._storage.read_ranges(self._url, [(self._position, size)], self._version)
        self._block_start = self._position


def _as_folder(key: str) -> str:
    return key.rstrip("/") + "/" if key else ""


def _is_hidden(url: str, folder: str) -> bool:
    return "/." in url[len(folder.rstrip("/")) :]


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[start, stop) of what is read to get all (offset, size): near ones together, sorted."""
    spans: list[tuple[int, int]] = []
    for offset, size in sorted(one for one in ranges if one[1]):
        if spans and offset - spans[-1][1] <= COALESCED_BYTES:
            start, stop = spans.pop()
            spans.append((start, max(stop, offset + size)))
        else:
            spans.append((offset, offset + size))
    return spans
