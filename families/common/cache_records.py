"""What became of the rows of a cache: a record for each tar, and the report of all."""

import json
import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.files import open_to_read
from warpcore.safe_json import MAX_JSON_BYTES
from warpcore.text import format_bytes

logger = logging.getLogger(__name__)

RECORD_SUFFIX = ".cache.json"
MAX_REPORTED = 20
"""How many unreadable samples a report names at most."""


@dataclass
class Record:
    """What became of a shard, or of several."""

    source: tuple[int, str] = (0, "")
    """Size in bytes and content hash of the tar of pictures; of older caches, its etag."""
    rows: int = 0
    samples: int = 0
    """How many of the rows have features."""
    reused: int = 0
    """How many samples had all their features copied from an earlier tar of the cache."""
    partly_reused: int = 0
    """How many had some copied: those of the text, or of pictures whose crops stayed the same."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that the training would not draw."""
    unreadable: list[str] = field(default_factory=list)
    """Samples that could not be decoded, and why."""
    cut_captions: int = 0
    """How many are longer than the text encoder reads."""
    tar_bytes: int = 0
    feature_bytes: dict[str, int] = field(default_factory=dict)
    largest_error: dict[str, float] = field(default_factory=dict)
    """Largest error of the stored numbers, by feature. It and the sums below count what was encoded, not copies."""
    squared_error: dict[str, float] = field(default_factory=dict)
    """Sum of the squared errors of the same numbers."""
    squared: dict[str, float] = field(default_factory=dict)
    """The sum of their squares."""
    seconds: float = 0.0

    def relative_error(self, name: str) -> float:
        """The error of a feature beside its size, both as root mean squares."""
        return math.sqrt(self.squared_error[name] / self.squared[name]) if self.squared[name] else 0.0

    @classmethod
    def total(cls, records: "Sequence[Record]") -> Self:
        """The record of several shards together."""

        def added(name: str, add: Callable = operator.add) -> dict:
            result: dict = {}
            for record in records:
                for key, value in getattr(record, name).items():
                    result[key] = add(result[key], value) if key in result else value
            return result

        return cls(
            rows=sum(record.rows for record in records),
            samples=sum(record.samples for record in records),
            reused=sum(record.reused for record in records),
            partly_reused=sum(record.partly_reused for record in records),
            rejected=added("rejected"),
            cut_captions=sum(record.cut_captions for record in records),
            unreadable=[one for record in records for one in record.unreadable],
            tar_bytes=sum(record.tar_bytes for record in records),
            feature_bytes=added("feature_bytes"),
            largest_error=added("largest_error", max),
            squared_error=added("squared_error"),
            squared=added("squared"),
            seconds=sum(record.seconds for record in records),
        )

    @staticmethod
    def is_beside(tar: Path) -> bool:
        """Whether `write` wrote a record for a tar, of whichever source: the tar is a cache's."""
        return tar.with_name(tar.name + RECORD_SUFFIX).is_file()

    @classmethod
    def read(cls, tar: Path, source: Shard) -> Self | None:
        """The record of a tar that is whole and was made from this very shard; None of another one."""
        path = tar.with_name(tar.name + RECORD_SUFFIX)
        if not (tar.is_file() and cls.is_beside(tar)):
            return None
        with open_to_read(path) as file:
            content = file.read(MAX_JSON_BYTES + 1)
        try:
            found = TypeAdapter(cls).validate_json(content, strict=True)
        except ValueError as error:
            logger.warning("%s is damaged (%.200s): %s is recreated", path, error, tar.name)
            return None
        accepted = [(source.size_bytes, identity) for identity in (source.content, source.etag)]
        return found if found.source in accepted else None

    def write(self, tar: Path) -> None:
        """Write it beside a tar, for `read`."""
        text = json.dumps(asdict(self), indent=1)
        storage_for(str(tar)).write(f"{tar}{RECORD_SUFFIX}", text.encode())


def report(record: Record, dtype: str, variants: int, waits: tuple[float, float] | None) -> str:
    """What a user should know of a cache that was made.

    waits: seconds that a run waits for a sample's latents and conditions, from pictures and from the cache; None where
    they were not measured.
    """
    samples = max(1, record.samples)
    parts = {name: size / samples for name, size in record.feature_bytes.items()}
    parts["captions, fields and headers"] = (record.tar_bytes - sum(record.feature_bytes.values())) / samples
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    lines = [
        f"cached {record.samples} of {record.rows} samples: {format_bytes(record.tar_bytes)}, "
        f"{format_bytes(record.tar_bytes / samples)} per sample ({sizes})"
    ]
    if record.reused or record.partly_reused:
        lines.append(f"  {record.reused} rows reused, {record.partly_reused} in part: their bytes are those of before")
    lines += [f"  {count} left out: {reason}" for reason, count in record.rejected.items()]
    if record.unreadable:
        lines.append(f"  {len(record.unreadable)} left out: unreadable")
        lines += [f"    {one}" for one in record.unreadable[:MAX_REPORTED]]
        if len(record.unreadable) > MAX_REPORTED:
            lines.append(
                f"    and {len(record.unreadable) - MAX_REPORTED} more, listed in the .cache.json of the tars"
            )
    if record.cut_captions:
        lines.append(
            f"  {record.cut_captions} captions are longer than the text encoder reads: their ends are cut off"
        )
    lines.append(f"stored as {dtype}; largest error, and error in relation to the numbers' size (rms):")
    lines += [
        f"  {name}: {record.largest_error[name]:.2g}, {100 * record.relative_error(name):.2g} %"
        for name in record.largest_error
    ]
    cost = record.seconds / samples
    lines.append(
        f"caching took {1000 * cost:.1f} ms per sample" + (f" ({variants} crops each)" if variants > 1 else "")
    )
    if waits is not None:
        from_pictures, from_cache = waits
        saved = from_pictures - from_cache
        lines[-1] += (
            f". A run waits {1000 * from_pictures:.1f} ms per sample for latents and conditions, "
            f"{1000 * from_cache:.1f} ms with this cache: "
        ) + (f"it pays after {cost / saved:.1f} epochs" if saved > 0 else "it saves no time, only memory")
    return "\n".join(lines)
