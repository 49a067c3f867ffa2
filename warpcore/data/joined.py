"""Further tars of the same samples, such as a cache beside the pictures that it was made from.

The tars of a folder hold further members of the samples of a data set: tar by tar under the same names, row by row in
the same order. `join` finds them; rows of a joined catalog bring along where those members lie.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warpcore.data.catalog import Catalog
from warpcore.data.index import MEMBER_COLUMNS, read_rows
from warpcore.data.shards import JoinedTar, Shard
from warpcore.data.storage_protocol import Version
from warpcore.errors import UserError

_PREFIX = "joined."


@dataclass(frozen=True)
class FurtherTars:
    """A folder of tars that mirror those of a data set."""

    folder: str
    """The complete URL of the folder."""
    members: frozenset[str]
    """The extensions to take from there."""
    remedy: str
    """What a user does where it lacks rows: the end of an error message."""
    remedy_of_data: str | None = None
    """What a user does where it has tars that the data set lacks; None where it may have more."""


@dataclass(frozen=True)
class _Part:
    """The tars of one folder for the shards of a joined catalog."""

    further: FurtherTars
    catalog: Catalog
    numbers: np.ndarray
    """(shards,) the number in `catalog` of each shard's tar."""

    def tar(self, number: int) -> JoinedTar:
        return self._joined(self.catalog.shard(int(self.numbers[number])))

    def tars(self) -> Iterator[JoinedTar]:
        """The joined tar of every shard, in order."""
        shards = list(self.catalog.shards())
        return (self._joined(shards[number]) for number in self.numbers.tolist())

    def _joined(self, shard: Shard) -> JoinedTar:
        return JoinedTar(shard, self.further.members, self.further.remedy)


class JoinedCatalog(Catalog):
    """A catalog whose samples have further members in the tars of other catalogs."""

    def __init__(self, catalog: Catalog, parts: Sequence[_Part]):
        super().__init__(catalog._table, catalog.weights)
        self._parts = tuple(parts)

    def shard(self, number: int) -> Shard:
        return super().shard(number).with_joined(part.tar(number) for part in self._parts)

    def shards(self) -> Iterator[Shard]:
        of_parts = [part.tars() for part in self._parts]
        return (shard.with_joined(tars) for shard, *tars in zip(super().shards(), *of_parts, strict=True))

    def versions(self) -> Iterator[tuple[str, Version]]:
        yield from super().versions()
        for part in self._parts:
            yield from part.catalog.versions()

    @property
    def members(self) -> frozenset[str]:
        held = [part.catalog.members & part.further.members for part in self._parts]
        return super().members.union(*held)

    def fingerprint(self, *, by_time: bool = False) -> dict:
        joined = {", ".join(sorted(part.further.members)): part.catalog.fingerprint() for part in self._parts}
        return super().fingerprint(by_time=by_time) | {"joined": joined}

    def on_this_machine(self) -> Self:
        parts = [_Part(part.further, part.catalog.on_this_machine(), part.numbers) for part in self._parts]
        return JoinedCatalog(super().on_this_machine(), parts)


def join(catalog: Catalog, further: Sequence[tuple[FurtherTars, Catalog]]) -> Catalog:
    """The catalog of a data set with the members that further tars hold of its samples.

    A tar belongs to the shard of its name, as `mirrored_name` gives it, or whose URL ends with its path in the folder.

    Raises:
        UserError: rows are missing there; says how many.
    """
    if not further:
        return catalog
    parts = [_Part(one, opened, _matching(catalog, opened, one.folder)) for one, opened in further]
    for part in parts:
        _check_rows(catalog, part)
        _check_tars(catalog, part)
    return JoinedCatalog(catalog, parts)


def mirrored_name(name: str) -> str:
    """The path of a mirrored tar in its folder, given the name of the shard in its catalog."""
    return name.replace("://", "/").lstrip("/")


def _matching(catalog: Catalog, other: Catalog, folder: str) -> np.ndarray:
    """(shards,) the number in `other` of each shard, -1 where it has none."""
    places = {url.removeprefix(folder.rstrip("/") + "/"): number for number, url in enumerate(other.urls)}
    found = [places.get(mirrored_name(catalog.name(number)), -1) for number in range(len(catalog))]
    taken = set(found)
    by_end = {number: _by_end(url, places) for number, url in enumerate(catalog.urls) if found[number] < 0}
    often = Counter(by_end.values())
    for number, place in by_end.items():
        found[number] = place if often[place] == 1 and place not in taken else -1
    return np.array(found, np.int64)


def _by_end(url: str, places: Mapping[str, int]) -> int:
    """The place whose path is the longest end of a URL."""
    parts = url.split("/")
    ends = ("/".join(parts[first:]) for first in range(1, len(parts)))
    return next((places[end] for end in ends if end in places), -1)


def _check_rows(catalog: Catalog, part: _Part) -> None:
    rows = catalog.rows
    there = np.where(part.numbers < 0, 0, part.catalog.rows[part.numbers])
    lacking, examples = 0, []
    for number in np.flatnonzero(there != rows).tolist():
        shard = catalog.shard(number)
        held = _keys(part.tar(number).shard) if there[number] else ()
        missing = rows[number] if not len(held) else _num_missing(_keys(shard), held)
        lacking += int(missing)
        examples.append(shard.url)
    if examples:
        what = f"lacks {lacking} of {catalog.num_rows} samples" if lacking else "has samples that are gone"
        raise UserError(f"{part.further.folder} {what}, of {_some(examples)}: {part.further.remedy}")


def _check_tars(catalog: Catalog, part: _Part) -> None:
    lost = sorted(set(range(len(part.catalog))) - set(part.numbers.tolist()))
    if lost and part.further.remedy_of_data is not None:
        urls = part.catalog.urls
        raise UserError(
            f"the data set lacks {int(part.catalog.rows[lost].sum())} samples that {part.further.folder} holds, of "
            f"{_some([urls[number] for number in lost])}: {part.further.remedy_of_data}"
        )


def _keys(shard: Shard) -> pa.ChunkedArray:
    return read_rows(shard, ["key"])["key"]


def _num_missing(keys: pa.ChunkedArray, held: pa.ChunkedArray) -> int:
    return pc.sum(pc.invert(pc.is_in(keys, value_set=held.combine_chunks()))).as_py() or 0


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more tars" if len(names) > shown else "")


# ------------------------------------------------------------------ rows


def with_joined(rows: pa.Table, shard: Shard, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a shard's index, and beside them where the members in its joined tars lie.

    Raises:
        UserError: those tars hold other samples.
    """
    for place, tar in enumerate(shard.joined):
        there = read_rows(tar.shard, ["key", *MEMBER_COLUMNS], start, stop)
        if not there["key"].equals(rows["key"]):
            keys, others = rows["key"].to_pylist(), there["key"].to_pylist()
            key, other = next(pair for pair in zip(keys, [*others, None], strict=False) if pair[0] != pair[1])
            held = f"{other!r}" if other is not None else "nothing"
            raise UserError(f"{tar.shard.url} holds {held} where {shard.url} holds {key!r}: {tar.remedy}")
        for name in MEMBER_COLUMNS:
            rows = rows.append_column(_column(place, name), there[name])
    return rows


def joined_columns(rows: pa.Table) -> list[str]:
    """The columns that `with_joined` has added."""
    return [name for name in rows.column_names if name.startswith(_PREFIX)]


def add_joined_members(
    rows: pa.Table, shards: Sequence[Shard], members: Sequence[dict[str, tuple[int, int]]]
) -> list[dict[str, tuple[str, Version]] | None]:
    """Add to the members of each row those in joined tars; gives the URL and version of the tars of these."""
    if not joined_columns(rows):
        return [None] * len(members)
    tars: list[dict[str, Any]] = [{} for _ in members]
    for place in range(len(shards[0].joined) if len(shards) else 0):
        columns = [rows[_column(place, name)].to_pylist() for name in MEMBER_COLUMNS]
        for own, of_sample, shard, *row in zip(members, tars, shards, *columns, strict=True):
            tar = shard.joined[place]
            for name, offset, size in _wanted(zip(*row, strict=True), tar.members):
                own[name] = offset, size
                of_sample[name] = tar.shard.url, (tar.shard.size_bytes, tar.shard.etag)
    return tars


def _wanted(members: Iterator[tuple[str, int, int]], names: Collection[str]) -> list[tuple[str, int, int]]:
    return [member for member in members if member[0] in names]


def _column(place: int, name: str) -> str:
    return f"{_PREFIX}{place}.{name}"
