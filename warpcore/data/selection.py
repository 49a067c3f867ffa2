"""Which rows of a data set can be drawn, why the others can't, and how a row becomes a sample."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog
from warpcore.data.columns import PREFIX, values_of, with_columns
from warpcore.data.dotted_names import DOTTED_NAME, as_read
from warpcore.data.expressions import near_names
from warpcore.data.filters import Filter, column_name
from warpcore.data.index import CUT_SHORT, HIDDEN_COLUMN, MEMBER_COLUMNS, has_member, read_rows
from warpcore.data.joined import add_joined_members, joined_columns, with_joined
from warpcore.data.samples import Sample
from warpcore.data.shards import Shard
from warpcore.data.tars import SHARED_KEY
from warpcore.errors import UserError
from warpcore.random import stable_hash

BASE_COLUMNS = ["key", "width", "height", *MEMBER_COLUMNS]
HELD_OUT = "held out for validation"
PASS_ROWS = 262_144
"""How many rows of a shard are looked at together in a pass over the whole index."""


class Piece(NamedTuple):
    """Rows [start, stop) of a shard: all of it, or part of a very large one."""

    shard: int
    start: int
    stop: int


def cut(catalog: Catalog, max_rows: int | np.ndarray) -> np.ndarray:
    """(pieces, 3) int64, the pieces of all shards in order, of at most `max_rows` rows (one number, or per shard)."""
    limits = np.broadcast_to(max_rows, len(catalog))
    counts = -(-catalog.rows // limits)
    shards = np.repeat(np.arange(len(catalog)), counts)
    starts = (np.arange(len(shards)) - np.repeat(np.cumsum(counts) - counts, counts)) * limits[shards]
    return np.stack([shards, starts, np.minimum(starts + limits[shards], catalog.rows[shards])], axis=1)


def as_pieces(rows: np.ndarray) -> Iterator[Piece]:
    """The pieces that `cut` gives."""
    return (Piece(*row.tolist()) for row in rows)


@dataclass(frozen=True)
class Rows:
    """The rows of a piece that can be drawn."""

    table: pa.Table
    """BASE_COLUMNS, and those that the selection names."""
    numbers: np.ndarray
    """(rows,) int64: their places in the shard."""
    rejected: Counter[str]
    """Reason -> how many rows of the piece can't be drawn, or pictures that dots in their names hide in other rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of some of the reasons, one row that it rejects, and what to do."""


NAMING_PROBLEMS = {
    SHARED_KEY: "rename one of them",
    DOTTED_NAME: "rename such pictures without dots, or make tars of their folder with tools/build_dataset.py",
}
"""Problems of rows that begin so, and what to do."""


@dataclass(frozen=True)
class Selection:
    """The conditions that a row has to meet."""

    filters: tuple[Filter, ...] = ()
    required_members: tuple[tuple[str, ...], ...] = ()
    """Of each entry, a row needs one of the extensions."""
    max_picture_pixels: int | None = None
    held_out: dict[int, np.ndarray] = field(default_factory=dict)
    """Shard number -> rows kept for validation."""
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    """Index columns whose values samples bring along, and their types."""
    required_columns: tuple[str, ...] = ()
    """Those of them without which a row is rejected."""

    def load(self, catalog: Catalog, piece: Piece) -> Rows:
        """Read the rows of a piece and keep those that meet the conditions, each rejection counted once."""
        shard = catalog.shard(piece.shard)
        found = with_joined(read_rows(shard, self._columns(), piece.start, piece.stop), shard, piece.start, piece.stop)
        numbers = np.arange(piece.start, piece.stop)
        rejected: Counter[str] = Counter()

        def keep(passed: np.ndarray, reason: str) -> None:
            nonlocal found, numbers
            if not passed.all():
                rejected[reason] += int((~passed).sum())
                found, numbers = found.filter(pa.array(passed)), numbers[passed]

        no_picture = _as_bool(pc.starts_with(found["problem"], "no picture").fill_null(False))
        keep(~no_picture, "no picture")
        cut_off = _as_bool(pc.ends_with(found["problem"], CUT_SHORT).fill_null(False))
        for tar in pc.unique(found["problem"].filter(pa.array(cut_off))).to_pylist():
            keep(_as_bool(pc.not_equal(found["problem"], tar).fill_null(True)), tar)
        examples = {}
        for problem, remedy in NAMING_PROBLEMS.items():
            passed = _as_bool(pc.invert(pc.starts_with(found["problem"], problem).fill_null(False)))
            if not passed.all():
                first = found["problem"][int(np.argmin(passed))].as_py()
                examples[problem] = _example(first.removeprefix(problem + ": "), shard, remedy)
            keep(passed, problem)
        if HIDDEN_COLUMN in found.column_names:
            hidden = found.filter(found[HIDDEN_COLUMN].is_valid())
            rejected[DOTTED_NAME] += sum(map(len, hidden[HIDDEN_COLUMN].to_pylist()))
            for row in hidden.slice(0, 1).to_pylist():
                example = as_read(row["key"], row[HIDDEN_COLUMN])
                examples.setdefault(DOTTED_NAME, _example(example, shard, NAMING_PROBLEMS[DOTTED_NAME]))
        keep(_as_bool(found["problem"].is_null()), "undecodable picture")
        if self.max_picture_pixels is not None:
            pixels = found["width"].to_numpy().astype(np.int64) * found["height"].to_numpy()
            keep(pixels <= self.max_picture_pixels, f"more than {self.max_picture_pixels} pixels (max_picture_pixels)")
        for suffixes in self.required_members:
            held = [_as_bool(has_member(found, suffix)) for suffix in suffixes]
            passed, reason = np.logical_or.reduce(held), f"no {_any_of(suffixes)}"
            if near := _near_member(found.filter(pa.array(~passed)), suffixes):
                key, name = near
                remedy = f"rename it to .{suffixes[0]}, or make tars of the folder with tools/build_dataset.py"
                examples[reason] = _example(f"{key}, which has a .{name} instead,", shard, remedy)
            keep(passed, reason)
        for name in self.required_columns:
            column = column_name(name)
            held = _as_bool(found[column].is_valid()) if column in found.column_names else np.zeros(len(found), bool)
            keep(held, f"no {name} in the index (captions_getter)")
        for condition in self.filters:
            try:
                verdict = condition.evaluate(found)
            except ValueError as error:
                raise UserError(f"{shard.url}: {error}") from error
            if verdict.num_missing:
                rejected[f"{condition} (value missing)"] += verdict.num_missing
            rejected[str(condition)] -= verdict.num_missing
            keep(verdict.passed, str(condition))
        keep(~np.isin(numbers, self.held_out.get(piece.shard, ())), HELD_OUT)
        base = found.select([*BASE_COLUMNS, *joined_columns(found)])
        table = with_columns(base, found, self.columns, shard.url)
        return Rows(table, numbers, +rejected, examples)

    def read(self, shard: Shard, start: int, stop: int, also: Sequence[str] = ()) -> pa.Table:
        """Rows of a shard as `load` gives them, whether they meet the conditions or not; `also` more of the index."""
        found = read_rows(shard, [*BASE_COLUMNS, *also, *map(column_name, self.columns)], start, stop)
        base = with_joined(found.select([*BASE_COLUMNS, *also]), shard, start, stop)
        return with_columns(base, found, self.columns, shard.url)

    def check(self, catalog: Catalog, captions: CaptionGetter | None = None) -> None:
        """Raise UserError where a filter, a caption or a required member asks for what no sample has."""
        for condition in self.filters:
            condition.check_keys(catalog.fields, catalog.nested)
        for suffixes in self.required_members:
            if catalog.members.isdisjoint(suffixes):
                near, held = near_names(suffixes[0], catalog.members), ", ".join(sorted(catalog.members))
                raise UserError(f"no sample has a {_any_of(suffixes)}.{near} The samples have: {held}")
        if captions is not None:
            known = catalog.fields | catalog.nested
            for key in captions.keys_of("json"):
                if key not in known:
                    near, held = near_names(key, known), ", ".join(sorted(known)) or "no .json fields"
                    raise UserError(
                        f"captions_getter {captions.expression.text!r}: no sample has {key!r}.{near} "
                        f"The samples have: {held}"
                    )

    def _columns(self) -> list[str] | None:
        if any(condition.takes_mapping and not condition.expression.only_keys for condition in self.filters):
            return None
        wanted = [name for condition in self.filters for name in condition.column_names]
        wanted += map(column_name, self.columns)
        return list(dict.fromkeys([*BASE_COLUMNS, "problem", HIDDEN_COLUMN, *wanted]))


@dataclass
class Survey:
    """What a pass over the whole index finds."""

    rows: int = 0
    passed: int = 0
    """Training rows: those that meet all conditions and are not held out."""
    rejected: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, str] = field(default_factory=dict)
    """Filtered column -> the values it was seen to have."""
    members: Counter[str] = field(default_factory=Counter)
    """How many training rows have each of the members that were asked for."""
    missing: Counter[str] = field(default_factory=Counter)
    """How many training rows lack each of the columns that the selection names."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of some of the reasons, the first row that was rejected, and what to do."""

    def __str__(self) -> str:
        reasons = [
            f"{count} rejected: {reason}" + (f" ({self.examples[reason]})" if reason in self.examples else "")
            for reason, count in self.rejected.most_common()
        ]
        ranges = [f"{name} is {seen}" for name, seen in self.ranges.items()]
        return "; ".join([f"{self.passed} of {self.rows} rows can be drawn", *reasons, *ranges])


def survey(catalog: Catalog, selection: Selection, members: Sequence[str] = ()) -> Survey:
    """Read every index once: a second per million rows and filter, longer where storage is slow."""
    result = Survey()
    limits: dict[str, list] = {}
    names = [name for condition in selection.filters for name in condition.column_names]
    for piece in as_pieces(cut(catalog, PASS_ROWS)):
        result.rows += piece.stop - piece.start
        rows = selection.load(catalog, piece)
        result.passed += len(rows.numbers)
        for member in members:
            result.members[member] += pc.sum(has_member(rows.table, member)).as_py() or 0
        for name in selection.columns:
            result.missing[name] += rows.table[PREFIX + name].null_count
        result.rejected += rows.rejected
        result.examples = rows.examples | result.examples
        for name, column in _columns_of(catalog, piece, names):
            seen = pc.min_max(column).as_py()
            limits.setdefault(name, []).extend(value for value in seen.values() if value is not None)
    for name, values in limits.items():
        result.ranges[name.removeprefix("json.")] = _range(values)
    return result


def _columns_of(catalog: Catalog, piece: Piece, names: list[str]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    if names:
        table = read_rows(catalog.shard(piece.shard), names, piece.start, piece.stop)
        yield from ((name, table[name]) for name in names if name in table.column_names)


def _range(values: list) -> str:
    numbers = [value for value in values if not isinstance(value, str)]
    texts = [value[:40] for value in values if isinstance(value, str)]
    shown = [f"{min(kind)!r} .. {max(kind)!r}" for kind in (numbers, texts) if kind]
    return " and ".join(shown) or "empty"


def make_samples(rows: pa.Table, shards: Sequence[Shard], seeds: Sequence[int]) -> list[Sample]:
    """A sample per row of a table as `Selection.load` gives it.

    Raises:
        UserError: a row lacks one of the columns that were asked for.
    """
    columns = [rows[name].to_pylist() for name in ("key", "width", "height")]
    names, offsets, sizes = (rows[name].to_pylist() for name in MEMBER_COLUMNS)
    members = [
        dict(zip(keys, zip(starts, lengths, strict=True), strict=True))
        for keys, starts, lengths in zip(names, offsets, sizes, strict=True)
    ]
    joined = add_joined_members(rows, shards, members)
    return [
        Sample(shard.url, key, held, width, height, seed, (shard.size_bytes, shard.etag), values, tars)
        for shard, key, width, height, held, seed, values, tars in zip(
            shards, *columns, members, seeds, values_of(rows, shards), joined, strict=True
        )
    ]


def hold_out(catalog: Catalog, selection: Selection, count: int, candidates: int = 262_144) -> dict[int, np.ndarray]:
    """Choose `count` rows for validation by the hash of their keys: shard number -> row numbers, sorted.

    Raises:
        UserError: no row would be left for training.
    """
    chosen, found = choose_by_hash(catalog, selection, count, candidates)
    if found <= count:
        raise UserError(
            f"validation_samples: {count} leaves no row for training: only {found} of {catalog.num_rows} rows "
            "can be drawn"
        )
    return chosen


def choose_by_hash(
    catalog: Catalog, selection: Selection, count: int, candidates: int = 262_144
) -> tuple[dict[int, np.ndarray], int]:
    """At most `count` rows by the hash of their keys, shard number -> row numbers, sorted; and of how many.

    Of a large data set, shards are looked at (by the hash of their names) until they hold `candidates` rows, so that
    the choice costs no pass over all indexes.
    """
    hashes: list[tuple[int, int, int]] = []
    looked_at = 0
    for number in sorted(range(len(catalog)), key=lambda number: stable_hash("validation", catalog.name(number))):
        if looked_at >= candidates and len(hashes) > count:
            break
        piece = Piece(number, 0, int(catalog.rows[number]))
        looked_at += piece.stop
        rows = selection.load(catalog, piece)
        keys = rows.table["key"].to_pylist()
        hashes += [(stable_hash(key), number, row) for key, row in zip(keys, rows.numbers.tolist(), strict=True)]
    chosen: dict[int, list[int]] = {}
    for _, number, row in sorted(hashes)[:count]:
        chosen.setdefault(number, []).append(row)
    return {number: np.array(sorted(rows)) for number, rows in sorted(chosen.items())}, len(hashes)


def _example(what: str, shard: Shard, remedy: str) -> str:
    return f"such as {what} in {shard.url}; {remedy}"


def _near_member(rows: pa.Table, suffixes: Sequence[str]) -> tuple[str, str] | None:
    """(key, extension) of a member that misses an extension in `suffixes` only by what is before it: `.jpg.txt`."""
    extensions = pc.unique(pc.list_flatten(rows["member_names"])).to_pylist()
    name = next((name for name in extensions if name.endswith(tuple(f".{suffix}" for suffix in suffixes))), None)
    return name and (rows.filter(has_member(rows, name))["key"][0].as_py(), name)


def _any_of(suffixes: Sequence[str]) -> str:
    return " or ".join(f".{suffix}" for suffix in suffixes)


def _as_bool(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
