"""What makes two tars the same data: their size, and a hash of what indexing reads of them.

A file's time of change, like the ETag of S3, says only when to look again: data that was copied, or rebuilt from the
same files, is the same data. What was looked at is remembered per machine, so that the next start reads no tar for it.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from warpcore.data.shards import Shard
from warpcore.data.sidecars import ABSENT, cache_locations
from warpcore.data.storage import read_ranges, real_url
from warpcore.errors import UserError
from warpcore.files import open_plain, read_bytes
from warpcore.safe_json import parse_json

HASHED_BYTES = 8192
"""The hash covers this much of the start of every member, which is the buffer that indexing reads of a picture."""
COMPARED_BLOCKS, BLOCK_BYTES = 64, 4096
"""Before one of two tars with the same hash is left out, this many blocks of them are compared."""
LOOKED_NAME = "looked-at.jsonl"
"""One line per tar of a folder that was looked at on this machine: name, size, etag and content hash."""

logger = logging.getLogger(__name__)
_Looked = dict[str, tuple[int, str, str]]
_of_files: dict[str, _Looked] = {}


def new_hash() -> Any:
    """The hash of a tar: of name, offset and size of its members, of the whole of texts, of the start of others."""
    return hashlib.blake2b(digest_size=16)


def remembered(shard: Shard) -> str | None:
    """The content hash of a tar that was looked at on this machine, None where it was not, or changed since."""
    folder, _, name = shard.url.rpartition("/")
    for location in cache_locations(folder + "/", LOOKED_NAME):
        size, etag, content = _looked_at(location).get(name, (None, None, None))
        if (size, etag) == (shard.size_bytes, shard.etag):
            return content
    return None


def remember(shard: Shard, content: str) -> None:
    """Note that this machine looked at a tar and found this content hash."""
    folder, _, name = shard.url.rpartition("/")
    line = json.dumps([name, shard.size_bytes, shard.etag, content]) + "\n"
    refusals = []
    for location in cache_locations(folder + "/", LOOKED_NAME):
        _looked_at(location)[name] = (shard.size_bytes, shard.etag, content)
        try:
            os.makedirs(os.path.dirname(location), exist_ok=True)
            with open_plain(Path(location), "a") as file:
                file.write(line)
            return
        except (OSError, UserError) as error:
            refusals.append(f"{location}: {getattr(error, 'strerror', error)}")
    logger.warning("%s is read again at the next start: %s", shard.url, "; ".join(refusals))


def same_blocks(one: Shard, other: Shard) -> bool:
    """Whether two tars of one size have the same bytes, as far as blocks show that are spread evenly over them.

    The hash knows only the start of pictures: scans on white paper may differ further down.
    """
    if real_url(one.url) == real_url(other.url):
        return True
    last = max(0, one.size_bytes - BLOCK_BYTES)
    places = sorted({last * number // (COMPARED_BLOCKS - 1) for number in range(COMPARED_BLOCKS)})
    ranges = [(place, min(BLOCK_BYTES, one.size_bytes)) for place in places]
    return read_ranges(one.url, ranges) == read_ranges(other.url, ranges)


def _looked_at(location: str) -> _Looked:
    if location not in _of_files:
        # Filled before other threads see it: one that found it empty would read a tar again that is known.
        _of_files.setdefault(location, _read_looked_at(location))
    return _of_files[location]


def _read_looked_at(location: str) -> _Looked:
    try:
        lines = read_bytes(location).decode("ascii", "replace").splitlines()
    except ABSENT:
        return {}
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", error)
        logger.warning("%s can't be read (%s): what it remembers is looked at again", location, reason)
        return {}
    found = {}
    for line in lines:
        try:
            name, size, etag, content = parse_json(line)
            found[name] = (size, etag, content)
        except (ValueError, TypeError):  # cut off while it was written: the tar is looked at again
            logger.info("%s: a damaged line is passed over", location)
    return found
