"""Index columns that a run asks for: numbers of each sample that arrive in its batch as tensors (`columns`)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from warpcore.data.catalog import Catalog
from warpcore.data.expressions import near_names
from warpcore.data.filters import MEASURED_COLUMNS, column_names, values_of, widened
from warpcore.data.index import read_rows
from warpcore.data.shards import Shard
from warpcore.errors import UserError

TENSOR_TYPES = {pa.bool_(): torch.bool, pa.int64(): torch.int64, pa.float64(): torch.float32}
"""What a column becomes in a batch. Networks compute in float32 at most, and MPS has no float64."""
LOOKED_AT_SHARDS = 256
"""The types of columns are taken from the indexes of this many shards at most, spread over the data set."""
PREFIX = "column."
"""The columns of a table of rows that hold the values asked for have this before their name."""


def column_types(catalog: Catalog, names: Iterable[str]) -> dict[str, pa.DataType]:
    """The type of each index column: bool, int64, float64 or string; the widest one where shards differ.

    Raises:
        UserError: no sample has the column, or it holds lists or mappings.
    """
    names = list(dict.fromkeys(names))
    known = {*catalog.fields, *MEASURED_COLUMNS}
    for name in names:
        if name not in known:
            kind = "holds lists or mappings" if name in catalog.nested else "is a field of no sample's .json"
            raise UserError(
                f"columns, captions_getter: {name!r} {kind}.{near_names(name, known)} The samples have: "
                f"{', '.join(sorted(known))}"
            )
    spread = np.unique(np.linspace(0, len(catalog) - 1, LOOKED_AT_SHARDS).astype(int)) if names else ()
    found: dict[str, set[pa.DataType]] = {name: set() for name in names}
    for number in spread:
        columns = [column for name in names for column in column_names(name)]
        row = read_rows(catalog.shard(int(number)), columns, 0, 1)
        for name in names:
            if (values := values_of(row, name)) is not None:
                found[name].add(values.type)
    return {name: _widest(types) for name, types in found.items()}


def tensor_types(types: Mapping[str, pa.DataType], names: Sequence[str]) -> dict[str, torch.dtype]:
    """What the columns are in a batch.

    Raises:
        UserError: a column holds text.
    """
    for name in names:
        if types[name] not in TENSOR_TYPES:
            raise UserError(f"columns: {name!r} holds text; a batch holds columns of numbers and truth values")
    return {name: TENSOR_TYPES[types[name]] for name in names}


def with_columns(rows: pa.Table, source: pa.Table, types: Mapping[str, pa.DataType], url: str) -> pa.Table:
    """`rows`, and beside them the columns of `source`, equally many rows of the index of the tar `url`.

    Raises:
        UserError: a value does not have the type of its column.
    """
    for name, kind in types.items():
        values = values_of(source, name)
        values = pa.nulls(len(source), kind) if values is None else values
        try:
            if pa.types.is_string(values.type) and not pa.types.is_string(kind):
                raise pa.ArrowInvalid("it is text here")
            rows = rows.append_column(PREFIX + name, values.cast(kind))
        except pa.ArrowInvalid as error:
            raise UserError(f"{url}: {name!r} is of type {kind} in other tars of the data set, but {error}") from None
    return rows


def columns_of(rows: pa.Table, shards: Sequence[Shard]) -> list[dict]:
    """Name -> value of each row.

    Raises:
        UserError: a value is absent; names the sample.
    """
    names = [name for name in rows.column_names if name.startswith(PREFIX)]
    if not names:
        return [{} for _ in range(len(rows))]
    columns = {name.removeprefix(PREFIX): rows[name].to_pylist() for name in names}
    for name, values in columns.items():
        if None in values:
            place = values.index(None)
            raise UserError(f"columns: sample {rows['key'][place].as_py()!r} in {shards[place].url} has no {name!r}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_missing(missing: Mapping[str, int], total: int, what: str) -> None:
    """Raises UserError where a column is absent from some of the rows that can be drawn."""
    for name, count in missing.items():
        if count:
            raise UserError(
                f"columns: {count} of {total} {what} samples have no {name!r}. Write it into their .json and build "
                f"the data set again, or leave those samples out with "
                f"dataset_filters: [[{name!r}, 'lambda value: True']]"
            )


def _widest(types: set[pa.DataType]) -> pa.DataType:
    order = [pa.bool_(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()]
    widest = max(types, key=order.index, default=pa.float64())
    return widened(widest)
