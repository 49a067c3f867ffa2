"""Whether caches were made from the same content of the data, and from the present one.

`cache.sources.json`, in every folder of tars of a cache, says what each tar was made from: one file to read at a
start, where the tars and their records are many.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from families.common.cache_records import RECORD_SUFFIX
from warpcore.data.catalog import Catalog
from warpcore.data.shards import Shard
from warpcore.data.sidecars import ABSENT
from warpcore.data.storage import complete_url, in_parallel, storage_for
from warpcore.errors import UserError
from warpcore.safe_json import parse_json

SOURCES_NAME = "cache.sources.json"
MAX_RECORDS = 256
"""Where a cache has no such file, the records of this many tars are read at most, spread over the data set."""

MAX_SOURCES_BYTES = 2**28
"""Of such a file: it has a line for each tar."""

T = TypeVar("T")


@dataclass(frozen=True)
class MadeFrom:
    """What a cache was made from."""

    source: Any
    """The `webdataset_path`; None where that is not known."""
    command: str
    """The command that brings the cache up to date."""

    @property
    def remedy(self) -> str:
        """The end of an error message."""
        return f"make it complete with {self.command}"


@dataclass(frozen=True)
class _Source:
    """What a tar of a cache was made from."""

    identity: tuple[int, str]
    """Size in bytes and content hash of a tar; in records of older caches perhaps its etag."""
    is_content: bool
    """Whether it is a content hash for certain."""

    def is_of(self, shard: Shard) -> bool:
        return self.identity in ((shard.size_bytes, shard.content), (shard.size_bytes, shard.etag))


@dataclass(frozen=True)
class _CachedTar:
    """A tar of a cache, as far as its source is no tar that the run reads too."""

    url: str
    folder: str
    source: _Source | None


def check_fresh(catalog: Catalog, caches: Mapping[str, MadeFrom], data: Any) -> list[str]:
    """Compare what the tars of caches say of their source with the tars of the data set, and with each other.

    Args:
        catalog: of samples that have features in these caches.
        caches: by folder, a complete URL.
        data: the value of the key that names the samples.

    Returns:
        What to tell of caches that can't be compared.

    Raises:
        UserError: a tar has other content than its features were made from, or two caches are of different content.
    """
    rows = [[shard, *(tar.shard for tar in shard.joined)] for shard in catalog.shards() if shard.joined]
    sources = _sources([shard for row in rows for shard in row if _folder_of(shard, caches)])
    notes: dict[tuple[str, str], str] = {}
    for row in rows:
        apart = list(_of_sources_elsewhere(row, sources, caches, data))
        for other in apart[1:]:
            _check_alike(apart[0], other, caches, notes)
    return list(notes.values())


def write_sources(tars: Sequence[Shard], sources: Sequence[tuple[int, str]]) -> None:
    """Write into every folder of a cache what its tars were made from: size and content hash of each source."""
    folders: dict[str, dict[str, list]] = defaultdict(dict)
    for tar, source in zip(tars, sources, strict=True):
        folder, _, name = tar.url.rpartition("/")
        folders[folder][name] = [tar.size_bytes, tar.content, *source]
    for folder, found in folders.items():
        storage_for(folder).write(f"{folder}/{SOURCES_NAME}", json.dumps(found, indent=0).encode())


def _of_sources_elsewhere(
    row: Sequence[Shard], sources: Mapping[str, _Source], caches: Mapping[str, MadeFrom], data: Any
) -> Iterator[_CachedTar]:
    """Those tars of the same samples that were not made from another one of them.

    Raises:
        UserError: one was, but that changed.
    """
    for shard in row:
        folder, source = _folder_of(shard, caches), sources.get(shard.url)
        others = [other for other in row if other is not shard]
        if folder is None or (source is not None and any(map(source.is_of, others))):
            continue
        changed = next((one for one in others if _is_named(caches[folder].source, one, caches, data)), None)
        if source is not None and changed is not None:
            raise UserError(f"{changed.url} changed since {shard.url} was made from it: {caches[folder].remedy}")
        yield _CachedTar(shard.url, folder, source)


def _is_named(source: Any, shard: Shard, caches: Mapping[str, MadeFrom], data: Any) -> bool:
    """Whether the source of a cache is the data set, or the other cache, that a tar belongs to."""
    folder = _folder_of(shard, caches)
    if folder is None:
        return source is not None and source == data
    return isinstance(source, str) and complete_url(source).rstrip("/") == folder


def _check_alike(
    one: _CachedTar, other: _CachedTar, caches: Mapping[str, MadeFrom], notes: dict[tuple[str, str], str]
) -> None:
    """Compare two tars of the same samples; adds to `notes`, by folders, why these can't be compared."""
    pair, folders = (one, other), (one.folder, other.folder)
    if None not in (one.source, other.source) and one.source.identity == other.source.identity:
        return
    made = [caches[folder] for folder in folders]
    if not all(tar.source is not None and tar.source.is_content for tar in pair):
        older = [tar.folder for tar in pair if tar.source is None or not tar.source.is_content]
        commands = " && ".join(caches[folder].command for folder in older)
        why = (
            f"an earlier version made {' and '.join(older)}; this makes them comparable, and encodes nothing that is "
        )
        why += f"there: {commands}"
    elif made[0].source != made[1].source:
        why = f"they were made from {made[0].source} and {made[1].source}"
    else:
        raise UserError(
            f"{one.url} and {other.url} were made from different content of {made[0].source}, which changed in "
            f"between. Make both complete: {made[0].command} && {made[1].command}"
        )
    notes.setdefault(
        folders, f"whether {folders[0]} and {folders[1]} are of the same pictures and captions is not known: {why}"
    )


def _folder_of(shard: Shard, caches: Iterable[str]) -> str | None:
    """The cache that a tar belongs to; None for a tar of pictures."""
    return next((folder for folder in caches if shard.url.startswith(f"{folder}/")), None)


def _sources(tars: Sequence[Shard]) -> dict[str, _Source]:
    """What tars of caches were made from, by their URLs, where that is known."""
    folders = list(dict.fromkeys(tar.url.rpartition("/")[0] for tar in tars))
    written = dict(zip(folders, in_parallel(_written, [(folder,) for folder in folders]), strict=True))
    found: dict[str, _Source] = {}
    for tar in tars:
        folder, _, name = tar.url.rpartition("/")
        version, source = written[folder].get(name, (None, None))
        if version == (tar.size_bytes, tar.content):  # else it was written again since
            found[tar.url] = _Source(source, is_content=True)
    lacking = [tar.url for tar in tars if tar.url not in found]
    spread = np.unique(np.linspace(0, len(lacking) - 1, MAX_RECORDS).astype(int)).tolist() if lacking else []
    urls = [lacking[place] for place in spread]
    recorded = zip(urls, in_parallel(_recorded, [(url,) for url in urls]), strict=True)
    return found | {url: _Source(source, is_content=False) for url, source in recorded if source is not None}


def _written(folder: str) -> dict[str, tuple[tuple[int, str], tuple[int, str]]]:
    """By name of a tar of a folder, size and content hash of itself and of its source."""

    def read(values: dict) -> dict:
        return {name: ((size, content), (of, hashed)) for name, (size, content, of, hashed) in values.items()}

    return _read_json(f"{folder}/{SOURCES_NAME}", read) or {}


def _recorded(url: str) -> tuple[int, str] | None:
    """Size and identity of what a tar was made from, of its record."""
    return _read_json(f"{url}{RECORD_SUFFIX}", lambda values: tuple(values["source"]))


def _read_json(url: str, read: Callable[[Any], T]) -> T | None:
    """What `read` makes of a file; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        with storage_for(url).open(url) as file:
            content = file.read(MAX_SOURCES_BYTES + 1)
    except ABSENT:
        return None
    try:
        return read(parse_json(content, MAX_SOURCES_BYTES))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url} is damaged ({str(error)[:200]}): remove it") from None
