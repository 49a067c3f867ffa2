"""Parquet files that may be a stranger's, read into bounded memory: few bytes may stand for one text in every row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warpcore.data.index_checks import DamagedError

MAX_BYTES = 2**29
"""Of the columns that are read at once, of their texts, and of their numbers."""
_VALUE_BYTES = 8


class _Stored(NamedTuple):
    """What the table of contents says of a column in a row group."""

    path: str
    num_bytes: int
    """Uncompressed, with each text at least once."""
    num_values: int

    @property
    def most_bytes(self) -> int:
        """Of its texts, if each held all that is stored."""
        return self.num_bytes * self.num_values


def read_row_groups(
    file: BinaryIO, parquet: pq.ParquetFile, groups: Sequence[int], columns: Iterable[str] | None = None
) -> pa.Table:
    """The columns of some row groups of an opened `file`, without its metadata.

    Raises:
        DamagedError: they take too much memory; the message names the column.
    """
    schema = parquet.schema_arrow
    kinds = dict(zip(schema.names, schema.types, strict=True))
    names = [name for name in (kinds if columns is None else columns) if name in kinds]
    stored = [_stored(parquet, group, names) for group in groups]
    _check_stored(stored)
    large = {name for name in names if sum(one[name].most_bytes for one in stored if name in one) > MAX_BYTES}
    texts = [
        name for name in names if name in large and (pa.types.is_string(kinds[name]) or kinds[name] == pa.binary())
    ]
    others = [name for name in names if name not in texts]
    lists = [stored[0][name].path for name in others if name in large and kinds[name] == pa.list_(pa.string())]
    # Lists of texts as they are stored, each text once.
    reader = pq.ParquetFile(file, metadata=parquet.metadata, read_dictionary=lists) if lists else parquet
    rows = reader.read_row_groups(list(groups), columns=others, use_threads=False)
    total = 0
    for name in others:
        total += sum(map(_text_bytes, rows[name].chunks))
        _check(name, total, "text")
    if lists:
        rows = rows.cast(pa.schema([schema.field(name) for name in rows.column_names]))
    if not texts:
        return rows
    batches = _batches(parquet, dict(zip(groups, stored, strict=True)), texts, total)
    long = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in texts]))
    return pa.table({name: (long if name in texts else rows)[name] for name in names})


def _stored(parquet: pq.ParquetFile, group: int, names: Sequence[str]) -> dict[str, _Stored]:
    about, found = parquet.metadata.row_group(group), {}
    for column in map(about.column, range(about.num_columns)):
        path = column.path_in_schema
        name = path if path in names else path.partition(".")[0]  # a list's column has a path inside it
        if name in names:
            found[name] = _Stored(path, max(column.total_uncompressed_size, 0), max(column.num_values, 0))
    return found


def _check_stored(stored: Iterable[Mapping[str, _Stored]]) -> None:
    num_bytes = num_values = 0
    for name, one in chain.from_iterable(group.items() for group in stored):
        num_bytes, num_values = num_bytes + one.num_bytes, num_values + one.num_values
        _check(name, max(num_bytes, _VALUE_BYTES * num_values), "values")


def _batches(
    parquet: pq.ParquetFile, stored: Mapping[int, Mapping[str, _Stored]], names: list[str], total: int
) -> Iterator[pa.RecordBatch]:
    """Columns of texts, no more rows at a time than fit if each held all that is stored."""
    for group, columns in stored.items():
        num_rows = max(1, MAX_BYTES // max(1, sum(columns[name].num_bytes for name in names)))
        for batch in parquet.iter_batches(num_rows, row_groups=[group], columns=names, use_threads=False):
            for name in names:
                total += batch[name].nbytes
                _check(name, total, "text")
            yield batch


def _check(name: str, num_bytes: int, what: str) -> None:
    if num_bytes > MAX_BYTES:
        raise DamagedError(
            f"with its column {name!r}, {num_bytes / 1e6:,.0f} MB of {what} would be read at once; the limit is "
            f"{MAX_BYTES / 1e6:,.0f} MB"
        )


def _text_bytes(values: pa.Array) -> int:
    """Of lists of texts, each text as often as it occurs."""
    if not pa.types.is_list(values.type) or not pa.types.is_dictionary(values.type.value_type):
        return 0
    texts = values.values
    return pc.sum(pc.take(pc.binary_length(texts.dictionary), texts.indices)).as_py() or 0
