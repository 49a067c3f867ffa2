"""Parquet files that may be a stranger's, read into bounded memory: few bytes may stand for one text in every row."""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warpcore.data.index_checks import DamagedError

_END = struct.Struct("<I4s")
MAX_BYTES = 2**29
"""Of the columns that are read at once, of their texts, and of their numbers."""
MAX_FOOTER_BYTES = 2**25
"""Of a file's description of itself, which takes about twenty times as much memory."""
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


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """A Parquet file that is opened already, with its own description of no more than `MAX_FOOTER_BYTES`.

    Raises:
        DamagedError: it has more, or is not Parquet.
        OSError, pa.ArrowException: it cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size))
    end = file.read(_END.size)
    length, mark = _END.unpack(end) if len(end) == _END.size else (0, b"")
    if mark not in (b"PAR1", b"PARE"):
        raise DamagedError("it does not end as Parquet does")
    if length > MAX_FOOTER_BYTES:
        raise DamagedError(f"its description takes {length / 1e6:,.0f} MB")
    file.seek(0)
    return pq.ParquetFile(file)


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
    texts = [name for name in names if name in large and _holds_text(kinds[name]) and not _holds_lists(kinds[name])]
    others = [name for name in names if name not in texts]
    lists = [stored[0][name].path for name in others if name in large and kinds[name] == pa.list_(pa.string())]
    for name in others:
        if name in large and _holds_text(kinds[name]) and kinds[name] != pa.list_(pa.string()):
            raise DamagedError(f"its column {name!r} is of {kinds[name]}, whose texts have no bound: leave it out")
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
            before = found.get(name, _Stored(path, 0, 0))  # a struct has a column for each of its fields
            num_bytes = before.num_bytes + max(column.total_uncompressed_size, 0)
            found[name] = _Stored(path, num_bytes, before.num_values + max(column.num_values, 0))
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


def _inner(kind: pa.DataType) -> list[pa.DataType]:
    return [kind.field(number).type for number in range(kind.num_fields)]


def _holds_text(kind: pa.DataType) -> bool:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(map(_holds_text, _inner(kind)))


def _holds_lists(kind: pa.DataType) -> bool:
    return (not pa.types.is_struct(kind) and kind.num_fields > 0) or any(map(_holds_lists, _inner(kind)))


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
