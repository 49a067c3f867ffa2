"""The scalar fields of the samples' .json as typed columns of an index."""

import json
import logging
from collections import Counter

import pyarrow as pa

from warpcore.data.tars import TarSample, clean

MAX_FIELDS = 256
"""A .json with more different keys than this over a shard is taken to hold data under them, not fields."""
_INT64 = range(-(2**63), 2**63)

logger = logging.getLogger(__name__)


def gather_fields(samples: list[TarSample]) -> tuple[dict[str, list], list[str]]:
    """Scalar fields as columns of len(samples) with None where absent, and the keys of lists and mappings."""
    contents = [sample.seen.get("json", {}) for sample in samples]
    scalars: Counter[str] = Counter()
    nested: Counter[str] = Counter()
    for content in contents:
        for name, value in content.items():
            (nested if isinstance(value, list | dict) else scalars)[name] += value is not None
    kept = sorted(name for name, number in scalars.most_common(MAX_FIELDS) if number)
    fields = {
        clean(name): [
            None if isinstance(content.get(name), list | dict) else content.get(name) for content in contents
        ]
        for name in kept
    }
    return fields, sorted(clean(name) for name, _ in nested.most_common(MAX_FIELDS))


def typed_column(values: list, name: str) -> pa.Array:
    """int64, double, bool or string. Numbers with fewer texts among them stay numbers, the texts are left out."""
    texts = Counter(value for value in values if isinstance(value, str))
    if 0 < 2 * texts.total() <= sum(value is not None for value in values):
        logger.warning("%s is a number, but text in %d samples (%.40r): missing", name, texts.total(), min(texts))
        values = [None if isinstance(value, str) else value for value in values]
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types <= {int, bool} and all(value is None or value in _INT64 for value in values):
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    if types <= {int, bool, float}:
        return pa.array([None if value is None else _as_float(value) for value in values], pa.float64())
    texts = [value if isinstance(value, str | None) else json.dumps(value) for value in values]
    return pa.array([None if text is None else clean(text) for text in texts], pa.string())


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
