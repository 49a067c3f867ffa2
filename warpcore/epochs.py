"""Keys that count updates take epochs too: `updates: 2e`. They become updates once the data is known.

An epoch draws each row as often as the `weight` of its source says, so it has

    rows that can be drawn x weights / batch_size

updates (with `bucket_config`, by the samples that an update has on average), and `2e` twice that, rounded down, but at
least 1. Rows that wait for their bucket to have a full micro-batch count where they are drawn: at the end of an epoch
some wait, and the first of the next one take their place.
Where `export_every` is a multiple of `save_every` in epochs, it is the same multiple in updates.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from numbers import Rational
from typing import Annotated, Any

from pydantic import PlainValidator, PositiveInt, TypeAdapter, ValidationError

from warpcore.text import counted

IN_UPDATES = ("updates", "warmup_updates", "save_every", "backup_every", "export_every", "decay_updates")
"""The keys that take epochs."""
_EPOCHS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)e")
_COUNT = TypeAdapter(PositiveInt)


def _count(value: Any) -> int | str:
    found = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    if found and float(found[1]) > 0:
        return value
    try:
        return _COUNT.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{error.errors()[0]['msg']}, or a number of epochs, as 2e or 0.5e") from None


Updates = Annotated[int | str, PlainValidator(_count)]
"""A number of updates, or of epochs: `2e`."""


def in_updates(given: Mapping[str, str], rows: float, batch_size: Rational) -> tuple[dict[str, int], list[str]]:
    """The numbers of updates for keys that have epochs, and a line about each; `rows` are what an epoch draws."""
    found = {key: max(1, _whole(text, rows, batch_size)) for key, text in given.items()}
    if {"save_every", "export_every"} <= given.keys():
        saves = _epochs(given["export_every"]) / _epochs(given["save_every"])
        if saves.denominator == 1:
            found["export_every"] = saves.numerator * found["save_every"]
    epoch = f"an epoch is {rows:,.10g} rows, {float(rows / batch_size):,.2f} updates"
    return found, [f"{key}: {given[key]} is {counted(number, 'update')} ({epoch})" for key, number in found.items()]


def _epochs(text: str) -> Fraction:
    """The number in `2e`, without the rounding of binary fractions."""
    return Fraction(_EPOCHS.fullmatch(text)[1])


def _whole(text: str, rows: float, batch_size: Rational) -> int:
    """Updates of `2e`, rounded down."""
    return math.floor(_epochs(text) * Fraction(rows).limit_denominator(10**6) / batch_size)
