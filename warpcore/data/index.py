"""The index of a shard: one row per sample, so that planning costs no picture byte.

`NAME.tar.index.parquet` lies beside the tar, or in the cache folder where the tar's place can't be written, or in the
folder or URL that WARPCORE_INDEX_CACHE names. Columns: key, width and height (px, EXIF rotation applied), problem (why
the row can't be drawn, or null), the members with offsets and sizes in bytes, and `json.FIELD` for every scalar field
of the samples' .json.
"""

import hashlib
import io
import json
import logging
import os
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import ExifTags, Image

from warpcore.data.filters import FIELD_PREFIX
from warpcore.data.samples import FORMATS, PICTURE_EXTENSIONS, PICTURE_FACTS, picture_member
from warpcore.data.shards import Shard
from warpcore.data.storage import ChangedShardError, StorageError, complete_url, patiently, storage_for
from warpcore.data.tars import BadShardError, CutShardError, TarSample, clean, read_samples, whole_ones
from warpcore.errors import UserError

INDEX_SUFFIX = ".index.parquet"
CACHE_VARIABLE = "WARPCORE_INDEX_CACHE"
CUT_SHORT = "is cut short"
"""The end of the problem of a row that stands for all that a tar is missing."""
"""Environment variable with a folder or URL: indexes are written there instead of beside the tars."""
INDEX_VERSION = 2
ROW_GROUP_ROWS = 16_384
MAX_FIELDS = 256
"""A .json with more different keys than this over a shard is taken to hold data under them, not fields."""
MEMBER_COLUMNS = ["member_names", "member_offsets", "member_sizes"]
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)
"""What pyarrow and we raise on a damaged parquet file: an index that is made anew."""
_METADATA_KEY = b"warpcore.index"
_ROTATED_ORIENTATIONS = (5, 6, 7, 8)
_INT64 = range(-(2**63), 2**63)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """What planning has to know of a shard before it reads its rows."""

    rows: int
    problems: int
    """How many of the rows can't be drawn."""
    fields: tuple[str, ...]
    """Scalar .json fields with at least one value."""
    nested: tuple[str, ...]
    """.json keys that hold lists or mappings."""
    members: tuple[str, ...]


def index_shard(shard: Shard) -> Summary:
    """Read the headers of a tar, of its pictures and its .json members, and write its index.

    Raises:
        BadShardError: the tar is damaged, or holds no picture that is whole.
        ChangedShardError: it changed meanwhile.
        OSError: it can't be read, or the index can't be written for another reason than a read-only place.
    """
    storage = storage_for(shard.url)
    with storage.open(shard.url) as file:
        try:
            samples = read_samples(file, shard.url, shard.size_bytes, partial(_look, file))
        except CutShardError as cut:
            samples = _before(cut, shard.url)
    _check_pictures(samples, shard.url)
    rows, nested = _make_table(samples, shard.url)
    if storage.stat(shard.url) != (shard.size_bytes, shard.etag):
        raise ChangedShardError(shard.url)
    fields = [name for name in rows.column_names if name.startswith(FIELD_PREFIX)]
    summary = Summary(
        rows=len(rows),
        problems=len(rows) - rows["problem"].null_count,
        fields=tuple(name.removeprefix(FIELD_PREFIX) for name in fields),
        nested=tuple(nested),
        members=tuple(sorted({name for sample in samples for name in sample.members})),
    )
    _write(shard, rows, summary)
    return summary


def read_summary(shard: Shard) -> Summary | None:
    """The summary in a shard's index, None where there is no index of this very tar."""
    for url in index_locations(shard.url):
        try:
            with storage_for(url).open(url) as file:
                return _summary_of(pq.read_schema(file), shard, url)
        except FileNotFoundError:
            continue
        except _StaleIndexError as reason:
            logger.warning("%s; the tar will be indexed again", reason)
        except StorageError:
            raise
        except UNREADABLE as error:
            logger.warning("%s can't be read (%s); the tar will be indexed again", url, error)
    return None


def read_rows(shard: Shard, columns: list[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
    """Rows [start, stop) of a shard's index; columns that it lacks are left out. Indexes the tar if need be."""
    for _ in range(2):
        for url in index_locations(shard.url):
            try:
                with storage_for(url).open(url) as file:
                    return _read_slice(file, shard, url, columns, start, stop)
            except (FileNotFoundError, _StaleIndexError):
                continue
            except StorageError:
                raise
            except UNREADABLE as error:
                logger.warning("%s can't be read (%s); the tar will be indexed again", url, error)
        if storage_for(shard.url).stat(shard.url) != (shard.size_bytes, shard.etag):
            raise ChangedShardError(shard.url)
        index_shard(shard)
    raise BadShardError(f"{shard.url}: its index can't be kept at {' or '.join(index_locations(shard.url))}")


def index_locations(url: str, suffix: str = INDEX_SUFFIX) -> list[str]:
    """Where a shard's index may lie, best first; or what else belongs to a URL, with another suffix."""
    places = [url + suffix, cache_location(url, suffix)]
    return places[::-1] if os.environ.get(CACHE_VARIABLE) else places


def cache_location(url: str, suffix: str) -> str:
    """The place in $WARPCORE_INDEX_CACHE, else in $XDG_CACHE_HOME/warpcore, for what does not lie beside `url`."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = complete_url(os.environ.get(CACHE_VARIABLE) or str(Path(folder, "warpcore", "index")))
    name = hashlib.blake2b(url.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{root.rstrip('/')}/{name}-{url.rsplit('/', 1)[-1][-100:]}{suffix}"


def write_beside(url: str, suffix: str, content: bytes) -> str:
    """Write `url + suffix`, or its place in the cache folder where that is read-only. Returns where it lies."""
    location = cache_location(url, suffix)
    if not os.environ.get(CACHE_VARIABLE):
        try:
            storage_for(url).write(url + suffix, content)
            return url + suffix
        except PermissionError:
            pass
    storage_for(location).write(location, content)
    return location


class _StaleIndexError(Exception):
    """The index belongs to another state of the tar, or to another version of Warpcore."""


def _summary_of(schema: pa.Schema, shard: Shard, url: str) -> Summary:
    saved = json.loads((schema.metadata or {})[_METADATA_KEY])
    if saved["version"] != INDEX_VERSION:
        raise _StaleIndexError(f"{url} has version {saved['version']} instead of {INDEX_VERSION}")
    if (saved["size_bytes"], saved["etag"]) != (shard.size_bytes, shard.etag):
        changed = f"{saved['size_bytes']} bytes, {saved['etag']} -> {shard.size_bytes} bytes, {shard.etag}"
        raise _StaleIndexError(f"{shard.url} changed since it was indexed ({changed})")
    summary = saved["summary"]
    names = {name: tuple(summary[name]) for name in ("fields", "nested", "members")}
    return Summary(rows=summary["rows"], problems=summary["problems"], **names)


def _read_slice(
    file: BinaryIO, shard: Shard, url: str, columns: list[str] | None, start: int, stop: int | None
) -> pa.Table:
    parquet = pq.ParquetFile(file)
    summary = _summary_of(parquet.schema_arrow, shard, url)
    stop = summary.rows if stop is None else stop
    names = parquet.schema_arrow.names
    columns = names if columns is None else [name for name in columns if name in names]
    first, last = start // ROW_GROUP_ROWS, -(-stop // ROW_GROUP_ROWS)
    rows = parquet.read_row_groups(list(range(first, last)), columns=columns, use_threads=False)
    return rows.slice(start - first * ROW_GROUP_ROWS, stop - start).replace_schema_metadata(None)


def _write(shard: Shard, rows: pa.Table, summary: Summary) -> None:
    saved = {"version": INDEX_VERSION, "size_bytes": shard.size_bytes, "etag": shard.etag, "summary": asdict(summary)}
    content = io.BytesIO()
    rows = rows.replace_schema_metadata({_METADATA_KEY: json.dumps(saved).encode()})
    pq.write_table(rows, content, row_group_size=ROW_GROUP_ROWS, compression="zstd", store_schema=True)
    write_beside(shard.url, INDEX_SUFFIX, content.getvalue())


def _before(cut: CutShardError, url: str) -> list[TarSample]:
    """The samples before the cut, and one row for all that is missing, so that every start counts and names it."""
    whole = whole_ones(cut.samples)
    if not any(_measured_member(sample) for sample in whole):
        raise BadShardError(str(cut)) from None
    logger.warning("%s Until then, those are used", cut)
    return [*whole, TarSample("(cut short)", problem=f"{url} {CUT_SHORT}")]


def _check_pictures(samples: list[TarSample], url: str) -> None:
    if not samples:
        raise BadShardError(f"{url} is an empty tar: it holds no sample")
    if not any(_measured_member(sample) for sample in samples):
        counts = Counter(name for sample in samples for name in sample.members)
        held = ", ".join(f"{number} x .{name}" for name, number in counts.most_common(8)) or "nothing"
        links = f"; {_LINKS}" if any(sample.links for sample in samples) else ""
        raise BadShardError(f"{url} holds no picture; its {len(samples)} samples hold {held}{links}")


_LINKS = "some members are links, without content: build the tar with tar --dereference --hard-dereference"


def _make_table(samples: list[TarSample], url: str) -> tuple[pa.Table, list[str]]:
    """The rows of the index, and the .json keys that hold lists or mappings."""
    measured = [_size_or_problem(sample) for sample in samples]
    names = pa.array([list(sample.members) for sample in samples], pa.list_(pa.string()))
    columns = {
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "width": pa.array([width for width, _, _ in measured], pa.int32()),
        "height": pa.array([height for _, height, _ in measured], pa.int32()),
        "problem": pa.array([problem for _, _, problem in measured], pa.string()),
        "member_names": names,
    }
    for place, name in enumerate(MEMBER_COLUMNS[1:]):
        values = [[member[place] for member in sample.members.values()] for sample in samples]
        columns[name] = pa.array(values, pa.list_(pa.int64()))
    fields, nested = _gather_fields(samples)
    columns |= {FIELD_PREFIX + name: _typed_column(values, f"{url}: {name!r}") for name, values in fields.items()}
    return pa.table(columns), nested


def _size_or_problem(sample: TarSample) -> tuple[int, int, str | None]:
    """(width, height, None) of the sample's picture, or (0, 0, why it can't be used)."""
    if sample.problem:
        return 0, 0, sample.problem
    extension = _measured_member(sample)
    if extension is None:
        return 0, 0, "no picture" + (f": {_LINKS}" if set(sample.links) & set(PICTURE_EXTENSIONS) else "")
    return sample.seen[extension]


def _measured_member(sample: TarSample) -> str | None:
    """The extension of its picture, or of what stands for it."""
    return picture_member(sample.members) or (PICTURE_FACTS if PICTURE_FACTS in sample.members else None)


def _look(file: BinaryIO, extension: str, offset: int, size: int) -> Any:
    """What the index needs of a member: (width, height, problem) of a picture or its facts, the content of a .json."""
    if extension in PICTURE_EXTENSIONS:
        return _measure(file, extension, offset, size)
    if extension == PICTURE_FACTS:
        return _told(_read_json(file, offset, size))
    return _read_json(file, offset, size) if extension == "json" else None


def _told(facts: dict[str, Any]) -> tuple[int, int, str | None]:
    """(width, height, problem) of a picture that is not there."""
    width, height, problem = (facts.get(name) for name in ("width", "height", "problem"))
    if not (isinstance(width, int) and isinstance(height, int)):
        return 0, 0, f"its .{PICTURE_FACTS} has no width and height"
    return width, height, None if problem is None else str(problem)


def _measure(file: BinaryIO, extension: str, offset: int, size: int) -> tuple[int, int, str | None]:
    window = _Window(file, offset, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return *picture_size(io.BufferedReader(window)), None
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder makes of hostile bytes says only that the picture is unusable
        if window.fault is not None:
            raise window.fault from None
        return 0, 0, f"undecodable .{extension}: {str(error).split('<')[0].strip() or type(error).__name__}"


def picture_size(file: BinaryIO | str | Path) -> tuple[int, int]:
    """(width, height) in px from the header of a picture, its EXIF rotation applied.

    Raises whatever Pillow raises for content that is no picture.
    """
    Image.MAX_IMAGE_PIXELS = None  # a header takes no memory; whoever decodes has a limit of his own
    with Image.open(file, formats=FORMATS) as image:
        # The method of PNG files decodes the whole picture in search of the tag.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        width, height = image.size
    return (height, width) if orientation in _ROTATED_ORIENTATIONS else (width, height)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    def read() -> bytes:
        file.seek(offset)
        return file.read(size)

    return patiently(read)


class _Window(io.RawIOBase):
    """A member's bytes as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self.fault: OSError | UserError | None = None
        """Why the file could not be read, as decoders may hide it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, position + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._size - self._position))
        try:
            piece = _read_at(self._file, self._offset + self._position, size)
        except (OSError, UserError) as error:
            self.fault = error
            raise
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _gather_fields(samples: list[TarSample]) -> tuple[dict[str, list], list[str]]:
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


def _read_json(file: BinaryIO, offset: int, size: int) -> dict[str, Any]:
    """A sample's .json; a broken one counts as empty here: it is a bad sample only where its caption is read."""
    text = _read_at(file, offset, size)
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _typed_column(values: list, name: str) -> pa.Array:
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


def has_member(rows: pa.Table, extension: str) -> pa.Array:
    """(rows,) bool: which rows hold a member of this extension."""
    names = rows["member_names"].combine_chunks()
    places = pc.filter(pc.list_parent_indices(names), pc.equal(pc.list_flatten(names), extension))
    return pc.is_in(pa.array(range(len(rows)), places.type), value_set=places)
