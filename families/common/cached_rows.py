"""Rows of a cache that can be copied when its tars are written again.

The facts of each row (`picture.json`) hold a hash of what its features were made from. A tar whose source changed
keeps its name until the new one takes its place, and has a second name until the cache is whole; a row whose hash is
found in it has its features copied as they stand, so that a data set that grows costs the encodings of its new rows.
"""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter

from warpcore.data.fields import variant_member
from warpcore.data.samples import PICTURE_FACTS, VISUAL_EXTENSIONS, Sample, visual_member
from warpcore.data.storage import read_ranges
from warpcore.data.tar_headers import Member, TarHeaderError, padded, read_members
from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.safe_json import parse_json

T = TypeVar("T")
HASH_BYTES = 16
ROWS_TOGETHER, BYTES_TOGETHER = 32, 2**26
"""Rows whose members are in memory together while they are hashed: their number and bytes, at most."""
_OLD = ".old"


@dataclass(frozen=True)
class Sources:
    """Hashes of a row's key and of the bytes that its features are made from."""

    pictures: tuple[str, ...]
    """Of each variant: the picture and what fields read beside it. Crops and frames that were drawn stay with it."""
    text: str
    """The members and the index columns that the caption is made from."""


@dataclass
class Copied:
    """What of a row is copied from an old tar."""

    members: dict[str, bytes] = field(default_factory=dict)
    """The content of the features, by member."""
    crops: dict[int, list[int]] = field(default_factory=dict)
    """[top, left] by variant, of those whose features are there."""
    has_text: bool = False
    caption_cut: bool = False
    """Whether the caption is longer than the text encoder reads, where `has_text`."""


def hash_sources(
    rows: Sequence[Sample], captions: Collection[str], fields: Sequence[Sequence[str]], variants: int
) -> list[Sources]:
    """The hashes of rows of one tar.

    Reads what features are made from, a second time beside the loader's, but decodes nothing.

    Args:
        captions: the members that captions are made from.
        fields: of each further member that the training reads, its extensions, the preferred first.
        variants: of the features of pictures; 0 where there are none.
    """
    found = []
    wanted = {*captions, *(name for names in fields for name in names), *(VISUAL_EXTENSIONS if variants else ())}
    for start, stop in _together(rows, wanted):
        samples = rows[start:stop]
        for sample, members in zip(samples, _contents(samples, wanted), strict=True):
            held = members.keys()
            besides = [next((name for name in names if name in held), None) for names in fields]
            of_picture = [name for name in (visual_member(held), *besides) if name is not None]
            of_text = [name for name in captions if name in held]
            of_variants = tuple(
                _digest(of_picture, members, [sample.key, variant, None])  # None: as earlier versions wrote it
                for variant in range(variants)
            )
            found.append(Sources(of_variants, _digest(of_text, members, [sample.key, sample.columns])))
    return found


def _together(samples: Sequence[Sample], wanted: Collection[str]) -> Iterator[tuple[int, int]]:
    """The ranges of samples whose members are read at once."""
    start = held = 0
    for place, sample in enumerate(samples):
        size = sum(size for name, (_, size) in sample.members.items() if name.lower() in wanted)
        if place > start and (place - start == ROWS_TOGETHER or held + size > BYTES_TOGETHER):
            yield start, place
            start, held = place, 0
        held += size
    if samples:
        yield start, len(samples)


def _contents(samples: Sequence[Sample], wanted: Collection[str]) -> list[dict[str, bytes]]:
    """The content of these members of samples of one tar, by lower-case extension."""
    spans = sorted(
        (offset, size, name.lower(), place)
        for place, sample in enumerate(samples)
        for name, (offset, size) in sample.members.items()
        if name.lower() in wanted
    )
    blocks = read_ranges(samples[0].shard, [span[:2] for span in spans], samples[0].version)
    found: list[dict[str, bytes]] = [{} for _ in samples]
    for (_, _, name, place), content in zip(spans, blocks, strict=True):
        found[place][name] = content
    return found


def _digest(names: Sequence[str], members: Mapping[str, bytes], also: Any) -> str:
    digest = hashlib.blake2b(json.dumps(also, sort_keys=True).encode(), digest_size=HASH_BYTES)
    for name in names:
        digest.update(f"\n{name} {len(members[name])}\n".encode())
        digest.update(members[name])
    return digest.hexdigest()


class OldRows:
    """The rows of old tars of a cache, by the hashes of what they were made from.

    Args:
        tars: they keep about 300 bytes per row and variant in memory.
        picture_features, text_features: names of the features.

    Raises:
        UserError: a tar is damaged.
    """

    def __init__(self, tars: Iterable[Path], picture_features: Collection[str], text_features: Collection[str]):
        self._picture_features, self._text_features = picture_features, text_features
        self._places: dict[str, tuple[Path, int]] = {}
        for path in tars:
            try:
                self._scan(path)
            except (TarHeaderError, UserError) as error:
                raise UserError(f"{path}, of before the source changed, is damaged ({error}): remove it") from None

    def _scan(self, path: Path) -> None:
        with open_to_read(path) as file:
            size, begin = file.seek(0, os.SEEK_END), 0
            for member in read_members(file):
                end = member.offset + padded(member.size)
                if end > size:
                    raise UserError(f"{member.name} ends behind its end")
                if member.name.endswith(f".{PICTURE_FACTS}"):
                    facts = _as_facts(_content(file, member))
                    for digest in [*facts.pictures, facts.text] if facts else []:
                        self._places.setdefault(digest, (path, begin))
                begin = end

    def copy(self, sources: Sources) -> Copied:
        """What was made from the same bytes. Raises OSError where it can't be read."""
        copied = Copied()
        for variant, digest in enumerate(sources.pictures):
            names = [variant_member(name, variant) for name in self._picture_features]
            row = self._row(digest, names)
            crops = _as_facts(row[PICTURE_FACTS]).crops if row else []
            if variant < len(crops):
                copied.members |= {name: row[name] for name in names}
                copied.crops[variant] = crops[variant]
        names = [variant_member(name, 0) for name in self._text_features]
        if names and (row := self._row(sources.text, names)):
            copied.members |= {name: row[name] for name in names}
            copied.has_text = True
            copied.caption_cut = _as_facts(row[PICTURE_FACTS]).caption_cut
        return copied

    def _row(self, digest: str, names: Collection[str]) -> dict[str, bytes] | None:
        """Members of the row with a hash, the facts among them; None where there is no such row."""
        if digest not in self._places:
            return None
        path, start = self._places[digest]
        found: dict[str, bytes] = {}
        with open_to_read(path) as file:
            members = read_members(file, start)
            first = next(members)
            key = first.name.removesuffix(PICTURE_FACTS)
            found[PICTURE_FACTS] = _content(file, first)
            for member in members:
                name = member.name.removeprefix(key)
                if not member.name.startswith(key) or name == PICTURE_FACTS:
                    break
                if name in names:
                    found[name] = _content(file, member)
                if len(found) > len(names):
                    break
        return found if found.keys() >= set(names) else None


@dataclass(frozen=True)
class _Facts:
    """What a row of a cache says that it was made from."""

    pictures: list[str]
    text: str
    caption_cut: bool
    crops: list[list[int]]


def _as_facts(content: bytes) -> _Facts | None:
    """Those in a row's PICTURE_FACTS; None where an earlier version made it. Raises UserError where it is damaged."""
    try:
        facts = parse_json(content)
        sources = facts.get("sources")
        if sources is None:
            return None
        found = TypeAdapter(_Facts).validate_python(sources | {"crops": facts.get("crops", [])})
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"a .{PICTURE_FACTS} in it: {str(error)[:200]}") from None
    return found


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def keep_old(path: Path) -> None:
    """Give a tar of a cache a second name, under which its rows are found after another took its place."""
    names = (path.with_name(f".{path.name}{_OLD}{number or ''}") for number in itertools.count())
    for name in names:
        if not name.exists():
            break
        if name.samefile(path):
            return
    try:
        name.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copyfile(path, name)


def old_tars(folder: Path) -> list[Path]:
    """The tars of a cache that another one took the place of."""
    return sorted(folder.rglob(f".*.tar{_OLD}*"))


def tee_locked(items: Iterable[T]) -> list[Iterator[T]]:
    """Two iterators over the same items, one for another thread."""
    lock = threading.Lock()

    def locked(iterator: Iterator[T]) -> Iterator[T]:
        while True:
            with lock:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    return [locked(iterator) for iterator in itertools.tee(items)]
