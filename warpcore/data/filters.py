"""Which rows of the index may be drawn: `dataset_filters`."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warpcore.data.expressions import Expression, compile_expression, near_names
from warpcore.errors import UserError
from warpcore.text import brief

FIELD_PREFIX = "json."
"""The scalar fields of a sample's .json are index columns of this prefix."""
MEASURED_COLUMNS = ("width", "height", "key")
"""Columns that every index has. width and height are the picture's own, whatever its .json says."""
VIDEO_COLUMNS = {
    "num_frames": pa.int32(), "fps": pa.float32(), "seconds": pa.float32(), "codec": pa.string(),
    "constant_rate": pa.bool_(), "rotation": pa.int16(),
}  # fmt: skip
"""Columns, beside those, of an index with videos (see `video_headers.Header`): null for pictures. Of a row where one
is null, the field of that name in its .json counts."""


@dataclass(frozen=True)
class Verdict:
    """What a filter says of a table of rows."""

    passed: np.ndarray
    """(rows,) bool."""
    missing: np.ndarray
    """(rows,) bool: rejected because a value is absent; these never reach the expression."""


@dataclass(frozen=True)
class Filter:
    """One entry of `dataset_filters`: columns of the index, and an expression that says from their values who stays.

    `[['width', 'height'], 'lambda w, h: w*h >= 589824']` names columns; `['json', 'lambda j: j["score"] > 5']` gets
    the row's fields as a mapping. A row without one of the values is rejected.
    """

    columns: tuple[str, ...]
    expression: Expression

    @classmethod
    def parse(cls, entry: Any) -> "Filter":
        """From the config's `[column or list of columns, expression]`."""
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            example = "['score', 'lambda s: s > 5']"
            raise UserError(f"dataset_filters: expected [column, expression] such as {example}, found {brief(entry)}")
        columns = (entry[0],) if isinstance(entry[0], str) else tuple(entry[0])
        expression = compile_expression(entry[1])
        if expression.num_arguments != len(columns):
            raise UserError(
                f"dataset_filters: {expression.text!r} takes {expression.num_arguments} values, "
                f"but {len(columns)} columns are named: {brief(list(columns))}"
            )
        return cls(columns, expression)

    @property
    def takes_mapping(self) -> bool:
        return self.columns == ("json",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields whose absence from every sample makes the filter a mistake."""
        return self.expression.keys if self.takes_mapping else self.columns

    def __str__(self) -> str:
        names = self.columns[0] if len(self.columns) == 1 else list(self.columns)
        return f"[{names!r}, {self.expression.text!r}]"

    def check_keys(self, fields: Collection[str], nested: Collection[str] = ()) -> None:
        """Raise UserError for a key that no sample of the data set has; `nested` are keys with lists or mappings."""
        known = {*fields, *MEASURED_COLUMNS}
        tested = sorted(self.expression.tested_keys & set(nested)) if self.takes_mapping else []
        for key in [*self.keys, *tested]:
            if key in nested and (key not in known or key in tested):
                raise UserError(f"dataset_filters {self}: {key!r} holds lists or mappings; filters see plain values")
            if key not in known:
                raise UserError(
                    f"dataset_filters {self}: no sample has {key!r}.{near_names(key, known)} "
                    f"The samples have: {', '.join(sorted(known))}. Remove the filter (dataset_filters=[] on the "
                    f"command line removes all), or write {key!r} into a .json beside each picture and build again"
                )

    @property
    def column_names(self) -> list[str]:
        """The columns of an index that may hold the keys."""
        return [column for key in self.keys for column in column_names(key)]

    def evaluate(self, rows: pa.Table) -> Verdict:
        """Which rows pass.

        Raises:
            UserError: the expression fails on a row; names the row, its values and the failure.
        """
        if self.takes_mapping:
            return self._evaluate_mappings(rows)
        passed = np.zeros(len(rows), dtype=bool)
        found = [values_of(rows, name) for name in self.columns]
        if any(values is None for values in found):
            return Verdict(passed, ~passed)
        columns = [values.combine_chunks() for values in found]
        present = np.logical_and.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns])
        places = np.flatnonzero(present)
        if len(places) < len(rows):
            columns = [column.take(pa.array(places)) for column in columns]
        values = [column.to_numpy(zero_copy_only=False).tolist() for column in columns]
        try:
            answers = np.fromiter(map(bool, map(self.expression.function, *values)), dtype=bool, count=len(places))
        except Exception:
            self._explain_failure(rows, places, values)
            raise
        passed[places] = answers
        return Verdict(passed, ~present)

    def _evaluate_mappings(self, rows: pa.Table) -> Verdict:
        wanted = self.column_names if self.expression.only_keys else [*rows.column_names]
        names = [name for name in rows.column_names if name in wanted and _is_field(name)]
        keys = list(dict.fromkeys(name.removeprefix(FIELD_PREFIX) for name in names))
        columns = [values_of(rows, key).to_pylist() for key in keys]
        passed, missing = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
        for place in range(len(rows)):
            fields = {key: column[place] for key, column in zip(keys, columns, strict=True)}
            fields = {key: value for key, value in fields.items() if value is not None}
            try:
                passed[place] = bool(self.expression(fields))
            except KeyError:
                missing[place] = True
            except Exception as error:
                raise self._failure(rows, place, fields, error) from error
        return Verdict(passed, missing)

    def _explain_failure(self, rows: pa.Table, places: np.ndarray, values: list[list]) -> None:
        """Find the row again that an evaluation in bulk failed on."""
        for place, row in zip(places, zip(*values, strict=True), strict=True):
            try:
                bool(self.expression(*row))
            except Exception as error:
                raise self._failure(rows, int(place), dict(zip(self.columns, row, strict=True)), error) from error

    def _failure(self, rows: pa.Table, place: int, fields: dict, error: Exception) -> UserError:
        key = rows["key"][place].as_py() if "key" in rows.column_names else f"row {place}"
        return UserError(f"dataset_filters {self} fails on sample {key!r} {fields}: {type(error).__name__}: {error}")


def _is_field(column: str) -> bool:
    return column in MEASURED_COLUMNS or column in VIDEO_COLUMNS or column.startswith(FIELD_PREFIX)


def column_names(field: str) -> list[str]:
    """The index columns that may hold what a user means by a name, the one that counts first."""
    if field in MEASURED_COLUMNS:
        return [field]
    return [*([field] if field in VIDEO_COLUMNS else []), FIELD_PREFIX + field]


def values_of(rows: pa.Table, field: str) -> pa.ChunkedArray | None:
    """The values of a name that a user writes, null where a row has none; None where no row can have one."""
    found = [rows[name] for name in column_names(field) if name in rows.column_names]
    if len(found) == 2 and found[0].null_count:
        kinds = [widened(values.type) for values in found]
        if len({pa.types.is_string(kind) for kind in kinds}) == 1:  # else the .json means something else
            kind = kinds[0] if kinds[0] == kinds[1] else pa.float64()
            return pc.coalesce(*(values.cast(kind) for values in found))
    return found[0] if found else None


def widened(kind: pa.DataType) -> pa.DataType:
    """int64 and float64 for narrower numbers."""
    return pa.int64() if pa.types.is_integer(kind) else pa.float64() if pa.types.is_floating(kind) else kind
