"""`webdataset_path`: from what a user writes to the list of tars it means."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from warpcore.data.storage import complete_url, is_remote, read_ranges, storage_for
from warpcore.data.storage_protocol import COMPRESSED_ENDINGS, TAR_ENDINGS
from warpcore.errors import UserError
from warpcore.text import decode_text

__all__ = ["Shard", "Source", "folders_named_whole", "named_folders", "read_ranges", "resolve_sources"]

MAX_BRACE_EXPANSIONS = 10_000_000
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

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


def resolve_sources(webdataset_path: Any) -> list[Source]:
    """The sources that a `webdataset_path` names, in its order, each with its shards sorted by name.

    Takes a tar, a folder (searched with its sub-folders), a glob, brace ranges (`{00000..00041}`, `{a,b}`), a URL, a
    `.yml` with a list of those (relative paths in it start at its own folder), a list of those, and for an entry
    `{path: ..., weight: 2}`.

    Raises:
        MissingShardError: names what is missing, and what lies near it.
        UserError: an entry that is none of the above, no tar in a folder, or a tar that is named twice.
    """
    entries = _entries(webdataset_path, str(Path.cwd()))
    sources = [Source(weight, _shards(text, folder)) for weight, text, folder in entries]
    seen: dict[str, int] = {}
    for number, source in enumerate(sources):
        for shard in source.shards:
            if shard.url in seen:
                raise UserError(
                    f"webdataset_path names {shard.url} twice (entries {seen[shard.url] + 1} and {number + 1}); "
                    "name it once, with {path: ..., weight: 2} if its rows shall occur more often"
                )
            seen[shard.url] = number
    if not seen:
        raise UserError("webdataset_path names no tar")
    return sources


def named_folders(webdataset_path: Any) -> list[str]:
    """The folder that each entry of a `webdataset_path` names, or in which it says what to look for, unlisted.

    Raises:
        UserError: as `resolve_sources` does for what is no path.
    """
    folders = []
    for _, text, folder in _entries(webdataset_path, str(Path.cwd())):
        fixed = re.split(r"[*?\[{]", text, maxsplit=1)[0]
        url = _literal(fixed, folder)
        is_part = fixed != text or url.endswith(TAR_ENDINGS)
        folders.append(url.rpartition("/")[0] if is_part and not fixed.endswith("/") else url.rstrip("/"))
    return list(dict.fromkeys(folders))


def folders_named_whole(webdataset_path: Any) -> list[str]:
    """The folders that entries of a `webdataset_path` name without choosing tars in them."""
    entries = _entries(webdataset_path, str(Path.cwd()))
    whole = [_literal(text, folder).rstrip("/") for _, text, folder in entries if not re.search(r"[*?\[{]", text)]
    return [url for url in dict.fromkeys(whole) if not url.endswith(TAR_ENDINGS)]


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
            raise UserError(f"webdataset_path: expected {{path: ..., weight: 2}}, found {value!r}")
        yield from _entries(value["path"], folder, weight * _checked_weight(value), within)
    elif not isinstance(value, str | Path) or not str(value):
        raise UserError(f"webdataset_path: expected a path, URL or list of those, found {value!r}")
    elif str(value).endswith((".yml", ".yaml")):
        if within:
            raise UserError(f"webdataset_path: {within} names another .yml, {value}; write its paths here")
        yield from _yaml_entries(_literal(str(value), folder), weight)
    else:
        yield weight, str(value), folder


def _checked_weight(entry: dict) -> float:
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"webdataset_path: a weight is a number above 0, found {weight!r} in {entry!r}")
    return float(weight)


def _yaml_entries(url: str, weight: float) -> Iterator[tuple[float, str, str]]:
    storage = storage_for(url)
    if not storage.stats([url]):
        raise MissingShardError(f"webdataset_path: there is no {url}.{_near(url)}")
    try:
        with storage.open(url) as file:
            entries = yaml.safe_load(decode_text(file.read(), url))
    except yaml.YAMLError as error:
        raise UserError(f"webdataset_path: {url} is not valid YAML: {error}") from None
    if not isinstance(entries, list | dict | str):
        raise UserError(f"webdataset_path: {url} should hold a list of paths, found {type(entries).__name__}")
    yield from _entries(entries, url.rpartition("/")[0], weight, within=url)


def _shards(text: str, folder: str) -> list[Shard]:
    if text.startswith("pipe:"):
        raise UserError(f"webdataset_path: {text!r}: commands are never run; write the path or URL of the tars")
    storage = storage_for(_literal(text, folder))
    known = storage.stats([_literal(text, folder)])
    expanded = [text] if known else list(expand_braces(text))
    if expanded != [text]:
        known = storage.stats([_literal(path, folder) for path in expanded])
    found: list[Shard] = []
    missing: list[str] = []
    for path in expanded:
        shards = _found(path, folder, known)
        missing += [] if shards else [_literal(path, folder)]
        found += shards
    if missing:
        named = f"{text!r} matches nothing" if len(expanded) == 1 and _GLOB_CHARACTERS.search(text) else "no such tar"
        more = f" and {len(missing) - 3} more of {len(expanded)}" if len(missing) > 3 else ""
        raise MissingShardError(
            f"webdataset_path: {named}: {', '.join(missing[:3])}{more} (from {text!r}).{_near(missing[0])}"
        )
    return sorted(found, key=lambda shard: shard.url)


def _literal(text: str, folder: str) -> str:
    """The complete URL of a path as it is written."""
    if re.match(r"[A-Za-z][A-Za-z0-9]+:", text) or text.startswith("~"):
        return complete_url(text)
    return f"{folder}/{text}" if is_remote(folder) else complete_url(os.path.join(folder, text))


def _found(text: str, folder: str, known: dict[str, tuple[int, str]]) -> list[Shard]:
    """What a path means without its braces: a tar or folder of this very name, or else what matches it as a glob."""
    url = _literal(text, folder)
    storage = storage_for(url)
    if url.endswith(COMPRESSED_ENDINGS):
        raise UserError(f"webdataset_path: {url} is compressed, so its samples can't be read singly; decompress it")
    if storage.is_folder(url):
        shards = _not_compressed(storage.tars(url), url)
        if not shards:
            raise UserError(f"webdataset_path: {url} holds no .tar; tools/build_dataset.py makes tars from pictures")
        return shards
    if url in known:
        return [Shard(url, *known[url])]
    if _GLOB_CHARACTERS.search(text):
        return _not_compressed(storage.glob(_literal(text, glob.escape(folder))), url)
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
            raise UserError(f"webdataset_path: {url} holds no .tar but {told}")
        logger.warning("webdataset_path: of the tars of %s, these are left out: %s", url, told)
    return [Shard(*entry) for entry in found if not entry[0].endswith(COMPRESSED_ENDINGS)]


def _near(url: str) -> str:
    near = storage_for(url).near(url)
    return f" Near it: {', '.join(near)}" if near else ""


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..02}{x,y}` -> a00x, a00y, a01x, ...; numbers keep the width of the first one."""
    parts: list[list[str] | range] = []
    position, width_of = 0, {}
    for match in _BRACES.finditer(pattern):
        numbers = _RANGE.fullmatch(match[1])
        if not numbers and "," not in match[1]:
            continue
        parts.append([pattern[position : match.start()]])
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            width_of[len(parts)] = len(numbers[1]) if numbers[1].startswith("0") else 0
            parts.append(range(first, last + 1))
        else:
            parts.append(match[1].split(","))
        position = match.end()
    parts.append([pattern[position:]])
    count = 1
    for part in parts:
        count *= len(part)
    if not 0 < count <= MAX_BRACE_EXPANSIONS:
        raise UserError(f"webdataset_path: {pattern!r} stands for {count} paths, expected 1 to {MAX_BRACE_EXPANSIONS}")
    for chosen in product(*parts):
        yield "".join(str(piece).zfill(width_of.get(place, 0)) for place, piece in enumerate(chosen))
