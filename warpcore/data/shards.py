"""`webdataset_path`: from what a user writes to the list of tars it means."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from warpcore.data.braces import Braces
from warpcore.data.storage import complete_url, is_remote, read_ranges, read_small, storage_for
from warpcore.data.storage_protocol import COMPRESSED_ENDINGS, TAR_ENDINGS
from warpcore.errors import UserError
from warpcore.redaction import CREDENTIALS_ELSEWHERE, has_credentials
from warpcore.safe_yaml import parse_yaml
from warpcore.text import brief, decode_text, shortened

__all__ = ["Shard", "Source", "folders_named_whole", "named_folders", "read_ranges", "resolve_sources"]

MAX_LIST_BYTES = 2**26
"""Of a .yml with paths."""
LOOKED_UP = 10_000
"""Paths of a pattern with braces that are looked up together."""
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000
"""With less than the first, thousands of epochs draw nothing; more than the second is more rows than memory holds."""
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_PATTERN_CHARACTERS = re.compile(r"[*?\[{]")

logger = logging.getLogger(__name__)


class MissingShardError(UserError, FileNotFoundError):
    """A path that leads to no tar."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar."""

    url: str
    size_bytes: int
    etag: str
    """Changes with the content: the ETag on S3, the time of the last change for a local file."""
    content: str | None = field(default=None, compare=False)
    """Hash of what indexing reads of it, where that is known: what makes it the same data as another tar."""
    rows: int | None = field(default=None, compare=False)
    """How many samples it holds, where that is known."""
    joined: "tuple[JoinedTar, ...]" = field(default=(), compare=False)
    """Tars with further members of its samples."""

    def with_joined(self, tars: "Iterable[JoinedTar]") -> "Shard":
        return replace(self, joined=(*self.joined, *tars))


@dataclass(frozen=True, slots=True)
class JoinedTar:
    """A tar of the same samples as a shard, row by row."""

    shard: Shard
    members: frozenset[str]
    """The extensions that are taken from it."""
    remedy: str
    """What a user does where it holds other samples: the end of an error message."""


@dataclass(frozen=True, slots=True)
class Source:
    """Tars whose rows occur `weight` times per epoch."""

    weight: float
    shards: list[Shard]


def resolve_sources(webdataset_path: Any, key: str = "webdataset_path") -> list[Source]:
    """The sources that a `webdataset_path`, or another key of data, names: in its order, shards sorted by name.

    Takes a tar, a folder (searched with its sub-folders), a glob, brace ranges (`{00000..00041}`, `{a,b}`), a URL, a
    `.yml` with a list of those (relative paths in it start at its own folder), a list of those, and for an entry
    `{path: ..., weight: 2}`.

    Args:
        key: the config key, or the argument, that an error names.

    Raises:
        MissingShardError: names what is missing, and what lies near it.
        UserError: an entry that is none of the above, no tar in a folder, or a tar that is named twice.
    """
    sources: list[Source] = []
    seen: dict[str, int] = {}
    with _naming(key):
        for number, (weight, text, folder) in enumerate(_entries(webdataset_path, str(Path.cwd()))):
            shards = []
            for shard in _shards(text, folder):
                if shard.url in seen:
                    raise UserError(
                        f"{shard.url} is named twice (entries {seen[shard.url] + 1} and {number + 1}); name it once, "
                        "with {path: ..., weight: 2} if its rows shall occur more often"
                    )
                seen[shard.url] = number
                shards.append(shard)
            sources.append(Source(weight, sorted(shards, key=lambda shard: shard.url)))
        if not seen:
            raise UserError("an empty list names no tar: name one, or write null where the key may be left out")
    return sources


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Inside, what is wrong with the value of a config key is told without the key, which is put before it."""
    try:
        yield
    except MissingShardError as error:
        raise MissingShardError(f"{key}: {error}") from error.__cause__
    except UserError as error:
        if type(error) is not UserError:  # of the storage, which says itself what is wrong
            raise
        raise UserError(f"{key}: {error}") from error.__cause__


def named_folders(webdataset_path: Any, key: str = "webdataset_path") -> list[str]:
    """The folder that each entry of a `webdataset_path` names, or in which it says what to look for, unlisted.

    Raises:
        UserError: as `resolve_sources` does for what is no path.
    """
    folders = []
    with _naming(key):
        for _, text, folder in _entries(webdataset_path, str(Path.cwd())):
            url = _literal(text, folder)
            there = _existing(url)
            fixed = url[:there] + _PATTERN_CHARACTERS.split(url[there:], maxsplit=1)[0]
            is_part = fixed != url or url.endswith(TAR_ENDINGS)
            folders.append(fixed.rpartition("/")[0] if is_part and not fixed.endswith("/") else fixed.rstrip("/"))
    return list(dict.fromkeys(folders))


def folders_named_whole(webdataset_path: Any, key: str = "webdataset_path") -> list[str]:
    """The folders that entries of a `webdataset_path` name without choosing tars in them."""
    with _naming(key):
        urls = [_literal(text, folder).rstrip("/") for _, text, folder in _entries(webdataset_path, str(Path.cwd()))]
    return [url for url in dict.fromkeys(urls) if _existing(url) == len(url) and not url.endswith(TAR_ENDINGS)]


def _existing(url: str) -> int:
    """How much of a URL is a name, not a pattern: up to the last slash before which all is there as it is written,
    brackets and all; up to the first character of a pattern otherwise."""
    first = _PATTERN_CHARACTERS.search(url)
    if first is None:
        return len(url)
    storage = storage_for(url)
    if storage.is_folder(url) or storage.stats([url]):
        return len(url)
    slashes = (place.start() for place in re.finditer("/", url))
    return next(
        (end for end in sorted(slashes, reverse=True) if end < first.start() or storage.is_folder(url[:end])), 0
    )


def _entries(
    value: Any, folder: str, weight: float = 1.0, within: str | None = None
) -> Iterator[tuple[float, str, str]]:
    """(weight, path, where it starts if it is relative) of every entry.

    `folder`: where relative paths start, a path or URL. `within`: the .yml that holds the value.
    """
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _entries(entry, folder, weight, within)
    elif isinstance(value, dict):
        if set(value) - {"path", "weight"} or "path" not in value:
            raise UserError(f"expected {{path: ..., weight: 2}}, found {brief(value)}")
        yield from _entries(value["path"], folder, _checked_weight(value, weight), within)
    elif not isinstance(value, str | Path) or not str(value) or not _can_be_a_name(str(value)):
        raise UserError(f"expected a path, URL or list of those, found {brief(value)}")
    elif str(value).endswith((".yml", ".yaml")):
        if within:
            raise UserError(f"{within} names another .yml, {value}; write its paths here")
        yield from _yaml_entries(_literal(str(value), folder), weight)
    else:
        yield weight, str(value), folder


def _can_be_a_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)  # names of files need not be UTF-8
    except UnicodeEncodeError:
        return False


def _checked_weight(entry: dict, outer: float) -> float:
    """The weight of an entry, times that of the entry around it."""
    weight = entry.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not MIN_WEIGHT <= outer * weight <= MAX_WEIGHT:
        raise UserError(
            f"a weight is a number above 0, found {brief(weight)} in {brief(entry)}; write one from "
            f"{MIN_WEIGHT} to {MAX_WEIGHT}"
        )
    return outer * float(weight)


def _yaml_entries(url: str, weight: float) -> Iterator[tuple[float, str, str]]:
    if not storage_for(url).stats([url]):
        raise MissingShardError(f"there is no {url}.{_near(url)}")
    entries = parse_yaml(decode_text(read_small(url, MAX_LIST_BYTES), url), url)
    if not isinstance(entries, list | dict | str):
        raise UserError(f"{url} should hold a list of paths, found {type(entries).__name__}")
    yield from _entries(entries, url.rpartition("/")[0], weight, within=url)


def _shards(text: str, folder: str) -> Iterator[Shard]:
    if text.startswith("pipe:"):
        raise UserError(f"{text!r}: commands are never run; write the path or URL of the tars")
    url = _literal(text, folder)
    known = storage_for(url).stats([url])
    paths = iter([text] if known else (braces := Braces(text)))
    count = 1 if known else braces.count
    while batch := list(islice(paths, LOOKED_UP)):  # a million paths of which none is there end with the first batch
        if batch != [text]:
            known = storage_for(url).stats([_literal(path, folder) for path in batch])
        missing = []
        for path in batch:
            shards = _found(path, folder, known)
            missing += [] if shards else [_literal(path, folder)]
            yield from shards
        if missing:
            is_glob = count == 1 and _GLOB_CHARACTERS.search(text)
            named = f"{shortened(repr(text))} matches nothing" if is_glob else "no such tar"
            more = f" and {len(missing) - 3} more of {min(count, LOOKED_UP)}" if len(missing) > 3 else ""
            raise MissingShardError(
                f"{named}: {', '.join(missing[:3])}{more} (from {brief(text)}).{_near(missing[0])}"
            )


def _literal(text: str, folder: str) -> str:
    """The complete URL of a path as it is written. Raises UserError where it holds credentials."""
    if has_credentials(text):
        raise UserError(f"{text!r} holds credentials; write the URL without them. {CREDENTIALS_ELSEWHERE}")
    if re.match(r"[A-Za-z][A-Za-z0-9]+:", text) or text.startswith("~"):
        return complete_url(text)
    return f"{folder}/{text}" if is_remote(folder) else complete_url(os.path.join(folder, text))


def _found(text: str, folder: str, known: dict[str, tuple[int, str]]) -> list[Shard]:
    """What a path means without its braces: a tar or folder of this very name, or else what matches it as a glob."""
    url = _literal(text, folder)
    storage = storage_for(url)
    if url.endswith(COMPRESSED_ENDINGS):
        raise UserError(f"{url} is compressed, so its samples can't be read singly; decompress it")
    if storage.is_folder(url):
        shards = _not_compressed(storage.tars(url), url)
        if not shards:
            raise UserError(f"{url} holds no .tar; tools/build_dataset.py makes tars from pictures")
        return shards
    if url in known:
        return [Shard(url, *known[url])]
    if _GLOB_CHARACTERS.search(text):
        there = _existing(url)
        pattern = re.sub(r"(\*\*/)+", "**/", url[there:])  # folders in folders are looked through once
        return _not_compressed(storage.glob(glob.escape(url[:there]) + pattern), url)
    return []


def _not_compressed(found: list[tuple[str, int, str]], url: str) -> list[Shard]:
    """The tars without compressed ones, which are named.

    Raises:
        UserError: all are compressed.
    """
    compressed = [entry[0] for entry in found if entry[0].endswith(COMPRESSED_ENDINGS)]
    if compressed:
        names = ", ".join(compressed[:3]) + (", ..." if len(compressed) > 3 else "")
        told = f"{len(compressed)} compressed ({names}), so their samples can't be read singly; decompress them"
        if len(compressed) == len(found):
            raise UserError(f"{url} holds no .tar but {told}")
        logger.warning("of the tars of %s, these are left out: %s", url, told)
    return [Shard(*entry) for entry in found if not entry[0].endswith(COMPRESSED_ENDINGS)]


def _near(url: str) -> str:
    near = storage_for(url).near(url)
    return f" Near it: {', '.join(near)}" if near else ""
