"""The curves in a run's `metrics.jsonl`, while it grows.

A hundred thousand lines are read in a fraction of a second: of a metric only its own numbers are looked for, once,
and later those of new lines. Before that, some lines from all over a long file make a first picture. The last line
may still be written, or added to, so it is read each time. Where a run went on from an earlier update, and its file
begins to differ, all is read once more.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from warpcore.safe_json import parse_json

BLOCK_BYTES = 2**24
MAX_LINE_BYTES = 2**20
MARK_BYTES = 256
"""What before the place that was read up to has to be as it was."""
LONGEST = 20
"""Lines of a block that tell the names of its metrics: those with a validation are longer than others."""
SKETCH_PARTS, SKETCH_BYTES = 250, 2**11
"""Of a sketch: how many parts of the file, and how much of each; files of less than twice as much have none."""
NUMBER = rb"([-+.0-9eE]{1,40}|null)[,}]"
_UPDATE = re.compile(rb'^\{"update": ([0-9]{1,15})[,}]', re.MULTILINE)
TOO_LARGE = 1e300
"""A number that counts as infinite: an axis that leads there ends beyond what a browser counts with."""
NO_CURVES = ("update", "samples_hash")
SEEN, SPEED = "samples_seen", "samples_per_second"


class Metrics:
    """Args:
    size: of the file in bytes, 0 where there is none. read: its bytes from an offset, at most the number asked for.
    batch_size: samples of an update where lines, as those of earlier versions, do not tell how many were seen.
    """

    def __init__(
        self,
        size: Callable[[], int],
        read: Callable[[int, int], bytes],
        batch_size: Callable[[], float] = lambda: math.nan,
    ):
        self._size, self._read, self._batch_size = size, read, batch_size
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._settled, self._mark = 0, b""
        self._sketch: Metrics | None = None
        self._columns: dict[str, _Column] = {}
        self._names: dict[str, None] = {}
        self.last: dict[str, Any] = {}
        """The last whole line."""
        self.strange = 0
        """Lines that are none of a run."""

    @property
    def names(self) -> list[str]:
        """Of the metrics found so far, in the order of the file."""
        return [name for name in self._names if name not in NO_CURVES]

    def refresh(self) -> None:
        """Look for new lines."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        size = self._size()
        if size < max(1, self._settled) or self._read(self._settled - len(self._mark), len(self._mark)) != self._mark:
            self._forget()
        start = max(self._settled, size - MAX_LINE_BYTES) if self._settled == 0 else self._settled
        new = self._read(start, size - start)
        end = new.rfind(b"\n")
        if end < 0:
            return
        begin = new.rfind(b"\n", 0, end) + 1  # of the last whole line; 0 where it is the only one that is new
        if begin:
            self._settled = start + begin
            self._mark = self._read(max(0, self._settled - MARK_BYTES), min(MARK_BYTES, self._settled))
        self.last = _line(new[begin:end])
        self._learn_names([new[begin:end]])

    def _learn_names(self, lines: list[bytes]) -> None:
        for line in lines:
            self._names |= dict.fromkeys(name for name, value in _line(line).items() if _is_number(value))

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The updates (N,) whose lines have a metric, increasing, and its values (N,): float64, NaN where infinite."""
        with self._lock:
            self._refresh()
            column = self._columns.setdefault(name, _Column(name))
            for block in self._blocks(column.read_to):
                is_new, ends = column.read_to >= self._looked_at(), _line_ends(block)
                strange = column.add(block, ends)
                if is_new:
                    self._learn_names(_longest(block, ends))
                    self.strange += strange
            updates, values = column.arrays()
            if name in self.last and _is_number(self.last[name]) and _is_update(self.last.get("update")):
                updates, values = np.append(updates, self.last["update"]), np.append(values, _value(self.last[name]))
        order = np.argsort(updates, kind="stable")
        return updates[order], values[order]

    def _looked_at(self) -> int:
        """Up to where any column was read."""
        return max((column.read_to for column in self._columns.values()), default=0)

    def _blocks(self, start: int) -> Iterator[bytes]:
        """The whole lines from an offset on."""
        while start < self._settled:
            block = self._read(start, min(BLOCK_BYTES, self._settled - start))
            block = block[: block.rfind(b"\n") + 1] or block  # a line of 16 MiB is none
            if not block:
                return
            start += len(block)
            yield block

    def sketch(self) -> "Metrics":
        """The metrics of some lines from all over the file; of a short file, all of them."""
        with self._lock:
            self._refresh()
            if self._settled < 2 * SKETCH_PARTS * SKETCH_BYTES:
                return self
            if self._sketch is None:
                starts = np.linspace(0, self._settled - SKETCH_BYTES, SKETCH_PARTS).astype(int).tolist()
                parts = [self._read(start, SKETCH_BYTES) for start in starts]
                lines = b"".join(part[part.find(b"\n") + 1 : part.rfind(b"\n") + 1] for part in parts)
                self._sketch = Metrics(
                    lambda: len(lines), lambda start, size: lines[start : start + size], self._batch_size
                )
            return self._sketch

    def has(self, name: str) -> bool:
        """Whether a metric was looked for before."""
        return name in self._columns

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Updates (N,), and how long training had taken by then, in seconds: without validation, drawing and pauses.

        Each interval between two reports has a speed, which is written to each of its lines.
        """
        updates, seen = self.column(SEEN)
        timed, speed = self.column(SPEED)
        if not len(updates):
            updates, seen = timed, timed * self._batch_size()
        speed = speed[np.isin(timed, updates)]
        both = np.isin(updates, timed)
        updates, seen = updates[both], seen[both]
        samples = np.diff(seen, prepend=seen[:1])
        if len(samples) > 1:
            samples[0] = samples[1]  # what came before the first line may be another run's
        with np.errstate(divide="ignore", invalid="ignore"):
            taken = samples / speed
        return updates, np.cumsum(np.where(np.isfinite(taken) & (taken > 0), taken, 0.0))

    def curve(
        self, name: str, by_time: bool, buckets: int, start: float | None = None, end: float | None = None
    ) -> dict[str, list]:
        """A metric over updates, or over seconds of training, in at most `buckets` buckets of equal width.

        Returns lists, an entry for each bucket that has lines: `x` of its last line; the `low`, `high` and `mean` of
        its values, None where none is finite; and the `count` of its lines.

        Args:
            start, end: of the range that is divided into buckets; None: that of the metric.
        """
        x, values = self.column(name)
        x = x.astype(np.float64)
        if by_time:
            updates, seconds = self.seconds()
            x = np.interp(x, updates, seconds) if len(updates) else np.zeros_like(x)
        return bucketed(x, values, buckets, start, end)


class _Column:
    """The numbers of a metric in the part of a file that was read."""

    def __init__(self, name: str):
        self.read_to = 0
        key = re.escape(json.dumps(name).encode())
        self._values = re.compile(key + rb": " + NUMBER)
        self._pairs = re.compile(rb'^\{"update": ([0-9]{1,15}),[^\n]*? ' + key + rb": " + NUMBER, re.MULTILINE)
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, block: bytes, ends: np.ndarray) -> int:
        """Whole lines, and where each ends; returns how many of them are none of a run."""
        self.read_to += len(block)
        values, updates, strange = self._values.findall(block), _numbered(block, ends), 0
        if updates is None or len(updates) != len(values):  # only some lines have it, or are none
            pairs = self._pairs.findall(block)
            updates = np.array([int(update) for update, _ in pairs], np.int64)
            values = [value for _, value in pairs]
            strange = len(ends) - len(_UPDATE.findall(block))
        self._found.append((updates, _numbers(values)))
        return strange

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self._found) > 1:
            self._found = [tuple(np.concatenate(parts) for parts in zip(*self._found, strict=True))]
        return self._found[0] if self._found else (np.zeros(0, np.int64), np.zeros(0))


def _line_ends(block: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(block, np.uint8) == 10)


def _longest(block: bytes, ends: np.ndarray) -> list[bytes]:
    """The longest lines of a block."""
    starts = np.concatenate([[0], ends + 1])[: len(ends)]
    places = np.argsort(ends - starts, kind="stable")[-LONGEST:]
    return [block[starts[place] : ends[place]] for place in places]


def _numbered(block: bytes, ends: np.ndarray) -> np.ndarray | None:
    """The updates of whole lines, where the first and the last of them tell those between."""
    if not len(ends):
        return None
    first, last = _UPDATE.match(block), _UPDATE.match(block, ends[-2] + 1 if len(ends) > 1 else 0)
    if first is None or last is None or int(last[1]) - int(first[1]) + 1 != len(ends):
        return None
    return np.arange(int(first[1]), int(last[1]) + 1)


def _numbers(values: list[bytes]) -> np.ndarray:
    """float64, NaN for null and for what is too large."""
    try:
        found = np.array(values, "S").astype(np.float64)
    except ValueError:
        found = np.array([_float(value) for value in values])
    return np.where(np.abs(found) < TOO_LARGE, found, np.nan)


def _float(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:  # null, or no number
        return np.nan


def _line(line: bytes) -> dict:
    try:
        found = parse_json(line, MAX_LINE_BYTES)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_update(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**15


def _value(value: float | None) -> float:
    try:
        found = float("nan" if value is None else value)
    except OverflowError:
        return float("nan")
    return found if abs(found) < TOO_LARGE else float("nan")


def bucketed(
    x: np.ndarray, values: np.ndarray, buckets: int, start: float | None = None, end: float | None = None
) -> dict[str, list]:
    """See `Metrics.curve`; x (N,) increases."""
    if start is not None or end is not None:
        low, high = -np.inf if start is None else start, np.inf if end is None else end
        # one beside each end, so that lines go on to the edge
        first, last = max(0, np.searchsorted(x, low) - 1), np.searchsorted(x, high, "right") + 1
        x, values = x[first:last], values[first:last]
    if not len(x):
        return {"x": [], "low": [], "high": [], "mean": [], "count": []}
    low, high = x[0] if start is None else start, x[-1] if end is None else end
    place = np.floor((x - low) * (buckets / max(high - low, 1e-9)))
    starts = np.flatnonzero(np.diff(place, prepend=place[0] - 1))
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.int64), starts)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = total / count
    return {
        "x": _short(x[np.append(starts[1:], len(x)) - 1]),
        "low": _short(np.fmin.reduceat(values, starts)),
        "high": _short(np.fmax.reduceat(values, starts)),
        "mean": _short(means),
        "count": count.tolist(),
    }


def _short(numbers: np.ndarray) -> list[float | None]:
    """Seven digits are more than a screen shows."""
    return [float(f"{number:.7g}") if np.isfinite(number) else None for number in numbers.tolist()]
