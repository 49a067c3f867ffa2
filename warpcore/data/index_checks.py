"""Whether an index or a manifest holds what it should: a data set of others brings its own, and disks damage files."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warpcore.data.filters import FIELD_PREFIX, VIDEO_COLUMNS
from warpcore.data.tar_headers import BLOCK_BYTES
from warpcore.safe_json import parse_json

MEMBER_COLUMNS = ["member_names", "member_offsets", "member_sizes"]
HIDDEN_COLUMN = "hidden_pictures"
"""Members that are pictures of other names, see `dotted_names`; only where there are any."""
REQUIRED = {
    "key": pa.string(), "width": pa.int32(), "height": pa.int32(), "problem": pa.string(),
    "member_names": pa.list_(pa.string()), "member_offsets": pa.list_(pa.int64()),
    "member_sizes": pa.list_(pa.int64()),
}  # fmt: skip
"""The columns of every index."""
_NEVER_NULL = REQUIRED.keys() - {"problem"}
_FIELD_TYPES = (pa.int64(), pa.float64(), pa.bool_(), pa.string())
_LEAST_MANIFEST_BYTES = 8
"""That a tar takes in a manifest, for its hash alone."""


class DamagedError(ValueError):
    """What a file of ours says can't be true."""


def saved_metadata(metadata: Mapping[bytes, bytes] | None, key: bytes) -> dict[str, Any]:
    """The JSON object that we keep in the metadata of a parquet file. Raises DamagedError."""
    try:
        saved = parse_json((metadata or {})[key])
    except KeyError:
        raise DamagedError("another program wrote it") from None
    except ValueError as error:
        raise DamagedError(f"its metadata are damaged: {error}") from None
    if not isinstance(saved, dict):
        raise DamagedError("its metadata are damaged")
    return saved


def checked(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The values of these names, which are exactly of these kinds; whole numbers are not negative, lists hold text.

    Raises:
        DamagedError: one is not.
    """
    if not isinstance(values, Mapping):
        raise DamagedError(f"it holds {values!r:.40} where names and values belong")
    for name, kind in kinds.items():
        value = values.get(name)
        is_right = type(value) is kind and not (kind is int and value < 0)
        if not is_right or (kind is list and not all(isinstance(one, str) for one in value)):
            raise DamagedError(f"its {name} is {value!r:.40}")
        check_text(value)
    return {name: values[name] for name in kinds}


def check_text(value: Any) -> None:
    """Raise DamagedError where text, or one in a list, is none that can be written."""
    try:
        for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
            text.encode()
    except UnicodeEncodeError:
        raise DamagedError("text in it is damaged") from None


def check_index(parquet: pq.ParquetFile, rows: int, fields: list[str], size_bytes: int, group_rows: int) -> None:
    """Compare the columns and the number of rows of an index with what it says of itself, and with its tar's size.

    Raises:
        DamagedError: they differ.
    """
    schema, about = parquet.schema_arrow, parquet.metadata
    types = dict(zip(schema.names, schema.types, strict=True))
    if len(types) != len(schema.names) or any(types.get(name) != kind for name, kind in REQUIRED.items()):
        raise DamagedError("its columns are not those of an index")
    if types.get(HIDDEN_COLUMN, pa.list_(pa.string())) != pa.list_(pa.string()):
        raise DamagedError(f"its column {HIDDEN_COLUMN} is of another type")
    if any(types.get(name, kind) != kind for name, kind in VIDEO_COLUMNS.items()):
        raise DamagedError("its columns of videos are of other types")
    of_fields = {name: kind for name, kind in types.items() if name.startswith(FIELD_PREFIX)}
    if set(fields_in(schema.names)) != set(fields):
        raise DamagedError("its columns are not the fields that it names")
    if wrong := [name for name, kind in of_fields.items() if kind not in _FIELD_TYPES]:
        raise DamagedError(f"its column {wrong[0]} is of another type")
    if about.num_rows != rows or rows > 1 + size_bytes // BLOCK_BYTES:
        raise DamagedError(f"it says that it has {rows} rows, and has {about.num_rows}")
    if about.num_row_groups != -(-rows // group_rows):
        raise DamagedError("its rows are grouped in another way")


def fields_in(columns: Iterable[str]) -> tuple[str, ...]:
    """The names, of an index's columns, that a filter may name beside those that every index has."""
    fields = [
        name.removeprefix(FIELD_PREFIX) for name in columns if name in VIDEO_COLUMNS or name.startswith(FIELD_PREFIX)
    ]
    return tuple(sorted(set(fields)))


def check_group_sizes(parquet: pq.ParquetFile, first: int, last: int, group_rows: int) -> None:
    """Raise DamagedError where row groups [first, last) do not begin at multiples of `group_rows`."""
    about = parquet.metadata
    for number in range(first, last):
        if about.row_group(number).num_rows != min(group_rows, about.num_rows - number * group_rows):
            raise DamagedError("its rows are grouped in another way")


def check_rows(rows: pa.Table, size_bytes: int) -> None:
    """Check rows of the index of a tar of `size_bytes`: their columns may be some only.

    Raises:
        DamagedError, pyarrow.ArrowInvalid: they can't be true.
    """
    rows.validate(full=True)  # of text, that it is UTF-8
    present = set(rows.column_names)
    for name in _NEVER_NULL & present:
        if rows[name].null_count:
            raise DamagedError(f"a row has no {name}")
    for name in {"width", "height"} & present:
        least = _least(rows[name])
        if least == 0 and "problem" in present:  # right for pictures that can't be read
            least = _least(rows[name].filter(rows["problem"].is_null())) - 1
        if least < 0:
            raise DamagedError(f"a picture has no {name}")
    lists = [rows[name].combine_chunks() for name in MEMBER_COLUMNS if name in present]
    if any(not one.offsets.equals(lists[0].offsets) for one in lists[1:]):
        raise DamagedError("a row has unequal numbers of names and places of members")
    flat = [values.flatten() for values in lists]
    if any(values.null_count for values in flat):
        raise DamagedError("a member has no name or place")
    numbers = [values.to_numpy() for values in flat if values.type == pa.int64()]
    if any(len(one) and not 0 <= one.min() <= one.max() <= size_bytes for one in numbers):
        raise DamagedError("a member lies outside of the tar")
    if len(numbers) == 2 and len(numbers[0]) and np.add(*numbers).max() > size_bytes:
        raise DamagedError("a member ends outside of the tar")


def _least(values: pa.ChunkedArray) -> int:
    return int(min((chunk.to_numpy().min() for chunk in values.chunks if len(chunk)), default=1))


def check_manifest(table: pa.Table) -> None:
    """Raise DamagedError or pyarrow.ArrowInvalid where the columns of a manifest can't be true."""
    table.validate(full=True)
    for name in table.column_names:
        if table[name].null_count:
            raise DamagedError(f"a tar has no {name}")
    for name in ("size_bytes", "rows", "problems"):
        if len(table) and pc.min(table[name]).as_py() < 0:
            raise DamagedError(f"a tar has less than 0 {name}")


def check_manifest_length(parquet: pq.ParquetFile, file_bytes: int) -> None:
    """Raise DamagedError where a manifest of `file_bytes` can't hold the rows that it says it has."""
    if parquet.metadata.num_rows > 100 + file_bytes // _LEAST_MANIFEST_BYTES:
        raise DamagedError(f"it says that it has {parquet.metadata.num_rows} rows, but it is small")
