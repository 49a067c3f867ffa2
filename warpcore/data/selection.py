"""Which rows of a data set can be drawn, why the others can't, and how a row becomes a sample."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog
from warpcore.data.clip_buckets import ClipBuckets, row_seeds
from warpcore.data.columns import columns_of, with_columns
from warpcore.data.dotted_names import DOTTED_NAME, as_read
from warpcore.data.expressions import near_names
from warpcore.data.filters import VIDEO_COLUMNS, Filter, column_names, values_of
from warpcore.data.index import CUT_SHORT, HIDDEN_COLUMN, MEMBER_COLUMNS, NO_VISUAL, has_member, read_rows
from warpcore.data.joined import add_joined_members, joined_columns, with_joined
from warpcore.data.member_headers import LONG_TEXT, UNDECODABLE_VIDEO
from warpcore.data.samples import Sample
from warpcore.data.shards import Shard
from warpcore.data.tars import SHARED_KEY
from warpcore.errors import UserError
from warpcore.random import stable_hash

BASE_COLUMNS = ["key", "width", "height", *MEMBER_COLUMNS]
FRAME_COLUMNS = {"num_frames": (pa.int32(), 1), "fps": (pa.float32(), 0.0)}
"""What rows have as well: types, and the values of pictures."""
FURTHER_OF_VIDEOS = tuple(name for name in VIDEO_COLUMNS if name not in FRAME_COLUMNS)
"""What else an index with videos says of them."""
VIDEOS_NOT_TAKEN = "a video, and this script takes pictures"
"""Why rows of videos are rejected, which tools/build_dataset.py --frames-every makes pictures of."""
HELD_OUT = "held out for validation"
NO_CAPTIONS = "[key, 'lambda key: \"\"']"
"""A `captions_getter` of which each sample has the empty text."""
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
    """The pieces of an array (n, 3) that `cut` gives."""
    return (Piece(*row.tolist()) for row in rows)


@dataclass(frozen=True)
class Rows:
    """The rows of a piece that can be drawn."""

    table: pa.Table
    """BASE_COLUMNS, FRAME_COLUMNS, and those that the selection names."""
    numbers: np.ndarray
    """(rows,) int64: their places in the shard."""
    rejected: Counter[str]
    """Reason -> how many rows of the piece can't be drawn, or pictures that dots in their names hide in other rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of some of the reasons, one row that it rejects, and what to do."""
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    """Reason -> (rows,) int64: the places in the shard of those that can't be drawn."""


NEVER_KEPT = "kept in no bucket, by the probabilities in bucket_config"
NAMING_PROBLEMS = {
    SHARED_KEY: "rename one of them",
    LONG_TEXT: "shorten it, or leave it out of the tar",
    UNDECODABLE_VIDEO: "encode it again, or leave it out",
    DOTTED_NAME: "rename such pictures without dots, or make tars of their folder with tools/build_dataset.py",
}
"""Problems of rows that begin so, and what to do."""
BAD_PICTURE = "undecodable picture"
MAX_EXAMPLES = 10
"""Of what is wrong with rows, each told of the first row that has it."""


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
    videos: bool = True
    """False: rows of videos are rejected."""
    buckets: ClipBuckets | None = None
    """Of a run of clips: a row that fits none of them is rejected."""

    def load(self, catalog: Catalog, piece: Piece) -> Rows:
        """Read the rows of a piece and keep those that meet the conditions, each rejection counted once."""
        shard = catalog.shard(piece.shard)
        found = with_joined(read_rows(shard, self._columns(), piece.start, piece.stop), shard, piece.start, piece.stop)
        sieve = _Sieve(shard, found, np.arange(piece.start, piece.stop))
        sieve.reject_problems()
        if not self.videos and "fps" in sieve.rows.column_names:
            sieve.keep(_as_bool(sieve.rows["fps"].is_null()), VIDEOS_NOT_TAKEN)
        if self.max_picture_pixels is not None:
            limit = f"more than {self.max_picture_pixels} pixels (max_picture_pixels)"
            sieve.keep(sieve.numbers_of("width") * sieve.numbers_of("height") <= self.max_picture_pixels, limit)
        if self.buckets is not None:
            sieve.fit(self.buckets)
        for suffixes in self.required_members:
            sieve.require_member(suffixes)
        for name in self.required_columns:
            sieve.require_column(name)
        for condition in self.filters:
            sieve.apply(condition)
        sieve.keep(~np.isin(sieve.numbers, self.held_out.get(piece.shard, ())), HELD_OUT)
        base = _with_frames(sieve.rows.select([*BASE_COLUMNS, *joined_columns(sieve.rows)]), sieve.rows)
        table = with_columns(base, sieve.rows, self.columns, shard.url)
        left_out = {reason: np.concatenate(numbers) for reason, numbers in sieve.left_out.items()}
        return Rows(table, sieve.numbers, +sieve.rejected, sieve.examples, left_out)

    def read(self, shard: Shard, start: int, stop: int, also: Sequence[str] = ()) -> pa.Table:
        """Rows of a shard as `load` gives them, whether they meet the conditions or not.

        also: further columns of the index, where it has them.
        """
        found = read_rows(shard, [*BASE_COLUMNS, *FRAME_COLUMNS, *also, *self._asked()], start, stop)
        known = [*BASE_COLUMNS, *(name for name in also if name in found.column_names)]
        base = with_joined(_with_frames(found.select(known), found), shard, start, stop)
        return with_columns(base, found, self.columns, shard.url)

    def check(
        self,
        catalog: Catalog,
        captions: CaptionGetter | None = None,
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Raise UserError where a filter, a caption or a required member asks for what no sample has.

        keys: the config keys that name required members, by the first extension of each.
        """
        keys = dict.fromkeys(captions.members if captions else (), "captions_getter") | dict(keys)
        for condition in self.filters:
            condition.check_keys(catalog.fields, catalog.nested)
        for suffixes in self.required_members:
            if catalog.members.isdisjoint(suffixes):
                near, held = near_names(suffixes[0], catalog.members), ", ".join(sorted(catalog.members))
                problem = f"no sample has a {_any_of(suffixes)}.{near} The samples have: {held}"
                if key := keys.get(suffixes[0]):
                    problem = (
                        f"{key}: {problem}. Write one of these into {key}, or put NAME.{suffixes[0]} beside NAME.jpg "
                        "and build the data set again"
                    )
                if key == "captions_getter":
                    problem += f", or write captions_getter: {NO_CAPTIONS} to train without captions"
                raise UserError(problem)
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
        return list(dict.fromkeys([*BASE_COLUMNS, *FRAME_COLUMNS, "problem", HIDDEN_COLUMN, *wanted, *self._asked()]))

    def _asked(self) -> list[str]:
        return [column for name in self.columns for column in column_names(name)]


class _Sieve:
    """Rows of a piece, while those that fail a condition are taken out, each counted under the first that it fails."""

    def __init__(self, shard: Shard, rows: pa.Table, numbers: np.ndarray):
        self.shard, self.rows, self.numbers = shard, rows, numbers
        self.rejected: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.left_out: dict[str, list[np.ndarray]] = {}

    def numbers_of(self, column: str) -> np.ndarray:
        return self.rows[column].to_numpy().astype(np.int64)

    def keep(self, passed: np.ndarray, reason: str) -> None:
        """Keep the rows that passed (rows,); the others are rejected for a reason."""
        if not passed.all():
            self.rejected[reason] += int((~passed).sum())
            self.left_out.setdefault(reason, []).append(self.numbers[~passed])
            self.rows, self.numbers = self.rows.filter(pa.array(passed)), self.numbers[passed]

    def reject_problems(self) -> None:
        """Reject the rows that can't be drawn, and count the pictures that dots in their names hide in others."""
        self.keep(~self._problem(pc.starts_with, NO_VISUAL), NO_VISUAL)
        for tar in pc.unique(
            self.rows["problem"].filter(pa.array(self._problem(pc.ends_with, CUT_SHORT)))
        ).to_pylist():
            self.keep(~self._problem(pc.equal, tar), tar)
        for problem, remedy in NAMING_PROBLEMS.items():
            failed = self._problem(pc.starts_with, problem)
            if failed.any():
                told = self.rows["problem"].filter(pa.array(failed)).to_pylist()
                examples = _one_of_each([text.removeprefix(problem + ": ") for text in told])
                self.examples[problem] = _example(examples, self.shard, remedy)
            self.keep(~failed, problem)
        if HIDDEN_COLUMN in self.rows.column_names:
            hidden = self.rows.filter(self.rows[HIDDEN_COLUMN].is_valid())
            self.rejected[DOTTED_NAME] += sum(map(len, hidden[HIDDEN_COLUMN].to_pylist()))
            for row in hidden.slice(0, 1).to_pylist():
                example = as_read(row["key"], row[HIDDEN_COLUMN])
                self.examples.setdefault(DOTTED_NAME, _example(example, self.shard, NAMING_PROBLEMS[DOTTED_NAME]))
        readable = _as_bool(self.rows["problem"].is_null())
        if not readable.all():
            bad = self.rows.filter(pa.array(~readable))
            told = zip(bad["key"].to_pylist(), bad["problem"].to_pylist(), strict=True)
            examples = _one_of_each([f"{key}: {problem}" for key, problem in told])
            self.examples[BAD_PICTURE] = _example(examples, self.shard, NAMING_PROBLEMS[UNDECODABLE_VIDEO])
        self.keep(readable, BAD_PICTURE)

    def require_member(self, suffixes: Sequence[str]) -> None:
        """Reject the rows that have a member of none of these extensions."""
        held = [_as_bool(has_member(self.rows, suffix)) for suffix in suffixes]
        passed, reason = np.logical_or.reduce(held), f"no {_any_of(suffixes)}"
        if near := _near_member(self.rows.filter(pa.array(~passed)), suffixes):
            key, name = near
            remedy = f"rename it to .{suffixes[0]}, or make tars of the folder with tools/build_dataset.py"
            self.examples[reason] = _example(f"{key}, which has a .{name} instead,", self.shard, remedy)
        self.keep(passed, reason)

    def require_column(self, name: str) -> None:
        """Reject the rows without a value in a column of the index."""
        values = values_of(self.rows, name)
        held = np.zeros(len(self.rows), bool) if values is None else _as_bool(values.is_valid())
        self.keep(held, f"no {name} in the index (captions_getter)")

    def apply(self, condition: Filter) -> None:
        """Reject the rows that don't pass a filter, or lack a value that it reads, which is counted apart."""
        try:
            verdict = condition.evaluate(self.rows)
        except ValueError as error:
            raise UserError(f"{self.shard.url}: {error}") from error
        self.keep(~verdict.missing, f"{condition} (value missing)")
        self.keep(verdict.passed[~verdict.missing], str(condition))

    def fit(self, buckets: ClipBuckets) -> None:
        """Reject the rows that fit no bucket, each for its reason, or that chance keeps out once and for all."""
        reasons = buckets.misfits(*shown_sizes(self.rows))
        for number, reason in enumerate(buckets.reasons):
            passed = reasons != number
            self.keep(passed, reason)
            reasons = reasons[passed]
        if buckets.by_row:
            widths, heights, *frames = shown_sizes(self.rows)
            seeds = row_seeds(self.rows["key"].to_pylist())
            self.keep(buckets.choose_many(widths, heights, seeds, *frames) >= 0, NEVER_KEPT)

    def _problem(self, test: Callable[[pa.ChunkedArray, str], pa.ChunkedArray], text: str) -> np.ndarray:
        """(rows,) bool: which rows have a problem that passes a test with a text."""
        return _as_bool(test(self.rows["problem"], text).fill_null(False))


def _with_frames(rows: pa.Table, source: pa.Table) -> pa.Table:
    """`rows` with the FRAME_COLUMNS of `source`, equally many rows of an index."""
    for name, (kind, of_pictures) in FRAME_COLUMNS.items():
        known = name in source.column_names
        values = source[name].fill_null(of_pictures) if known else pa.repeat(pa.scalar(of_pictures, kind), len(rows))
        rows = rows.append_column(name, values)
    return rows


def shown_sizes(rows: pa.Table) -> tuple[np.ndarray, ...]:
    """(rows,) each, of an index: width and height in px, frames, and frames per second, 1 and 0 of pictures."""
    sizes = _with_frames(rows.select(["width", "height"]), rows)
    return tuple(sizes[name].to_numpy() for name in ("width", "height", *FRAME_COLUMNS))


def make_samples(rows: pa.Table, shards: Sequence[Shard], seeds: Sequence[int]) -> list[Sample]:
    """A sample per row of a table as `Selection.load` gives it.

    Raises:
        UserError: a row lacks one of the columns that were asked for.
    """
    columns = [rows[name].to_pylist() for name in ("key", "width", "height", *FRAME_COLUMNS)]
    names, offsets, sizes = (rows[name].to_pylist() for name in MEMBER_COLUMNS)
    members = [
        dict(zip(keys, zip(starts, lengths, strict=True), strict=True))
        for keys, starts, lengths in zip(names, offsets, sizes, strict=True)
    ]
    joined = add_joined_members(rows, shards, members)
    return [
        Sample(shard.url, key, held, width, height, seed, (shard.size_bytes, shard.etag), values, tars, frames, fps)
        for shard, key, width, height, frames, fps, held, seed, values, tars in zip(
            shards, *columns, members, seeds, columns_of(rows, shards), joined, strict=True
        )
    ]


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


def _one_of_each(told: Sequence[str]) -> str:
    """Of texts `NAME: what is wrong` the first for every kind of fault, whatever its numbers; at most MAX_EXAMPLES."""
    first: dict[str, str] = {}
    for text in told:
        first.setdefault(re.sub(r"[\d,]+", "", text.partition(": ")[2]), text)
    return ", ".join(list(first.values())[:MAX_EXAMPLES])


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
