"""The index of a shard: one row per sample, so that planning costs no picture byte.

`NAME.tar.index.parquet` lies beside the tar, or where `sidecars` puts what can't lie there. Columns: key, width and
height (px, rotation applied), problem (why the row can't be drawn, or null), the members with offsets and sizes in
bytes, `json.FIELD` for every scalar field of the samples' .json, and VIDEO_COLUMNS where the tar holds videos. Its
metadata identify the tar by size and content hash (see `identity`), and hold the etag it had then, by which an
unchanged tar is known without reading it.
"""

import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warpcore.data.bounded_parquet import open_parquet, read_row_groups
from warpcore.data.dotted_names import DOTTED_NAME, as_read, dotted, hidden_pictures
from warpcore.data.filters import FIELD_PREFIX, VIDEO_COLUMNS
from warpcore.data.identity import new_hash, remember, remembered
from warpcore.data.index_checks import (
    HIDDEN_COLUMN,
    MEMBER_COLUMNS,
    check_group_sizes,
    check_index,
    check_rows,
    checked,
    fields_in,
    saved_metadata,
)
from warpcore.data.json_columns import gather_fields, typed_column
from warpcore.data.member_headers import LONG_TEXT, MAX_TEXT_BYTES, TEXT_EXTENSIONS, UNDECODABLE_VIDEO, Visual, look
from warpcore.data.samples import PICTURE_FACTS, VIDEO_EXTENSIONS, VISUAL_EXTENSIONS, visual_member
from warpcore.data.shards import Shard
from warpcore.data.sidecars import ABSENT, locations, write_beside
from warpcore.data.storage import reading, storage_for
from warpcore.data.storage_protocol import ChangedShardError, StorageError
from warpcore.data.tars import SHARED_KEY, BadShardError, CutShardError, TarSample, clean, read_samples, whole_ones

INDEX_SUFFIX = ".index.parquet"
CUT_SHORT = "is cut short"
"""The end of the problem of a row that stands for all that a tar is missing."""
NO_VISUAL = "no picture"
"""The start of the problem of a row that has no picture or video."""
INDEX_VERSION = 3
ROW_GROUP_ROWS = 16_384
MAX_SIDE_PX = 2**31
MANIFEST_NAME = "dataset.manifest.parquet"
"""Of a folder: what the indexes of its tars say in short, see `catalog`."""
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)
"""What pyarrow and we raise on a damaged parquet file: an index that is written again."""
_SAVED = {"version": int, "size_bytes": int, "etag": str, "summary": dict}
_SUMMARY = {
    "rows": int, "problems": int, "fields": list, "nested": list, "members": list, "content": str, "renumbered": bool,
}  # fmt: skip
_METADATA_KEY = b"warpcore.index"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """What planning has to know of a shard before it reads its rows."""

    rows: int
    problems: int
    """How many of the rows can't be drawn."""
    fields: tuple[str, ...]
    """Scalar .json fields with at least one value, and VIDEO_COLUMNS where it has them."""
    nested: tuple[str, ...]
    """.json keys that hold lists or mappings."""
    members: tuple[str, ...]
    content: str
    """Content hash of the tar."""
    renumbered: bool = False
    """Whether an index of version 2 had other rows."""

    @property
    def lacks_videos(self) -> bool:
        """Whether the tar has videos of which the index of an earlier version says nothing."""
        return _lacks_videos(self.members, self.fields)


def index_shard(shard: Shard, *, replace: bool = False) -> Summary:
    """Read the headers of a tar, of its pictures and videos, its texts, and write its index.

    An index that is there of the same content stays as it is, unless `replace`; that the tar was looked at is
    remembered.

    Raises:
        BadShardError: the tar is damaged, or holds no picture or video that is whole.
        ChangedShardError: it changed meanwhile.
        LostShardError, ReadFaultError: it can't be read.
        UserError: the index can be written nowhere.
    """
    storage, content_hash = storage_for(shard.url), new_hash()
    with reading(shard.url), storage.open(shard.url) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about broken headers: a picture's problem says it
        try:
            samples = read_samples(file, shard.url, shard.size_bytes, partial(look, file, content_hash), content_hash)
        except CutShardError as cut:
            samples = _before(cut, shard.url)
    _refuse_ambiguous(samples)
    _check_visuals(samples, shard.url)
    rows, nested = _make_table(samples, shard.url)
    _check_unchanged(shard)
    summary = Summary(
        rows=len(rows),
        problems=len(rows) - rows["problem"].null_count,
        fields=fields_in(rows.column_names),
        nested=tuple(nested),
        members=tuple(sorted({name for sample in samples for name in sample.members})),
        content=content_hash.hexdigest(),
        renumbered=any(sample.renumbered for sample in samples),
    )
    present = [] if replace else list(_present_indexes(shard))
    if any(_is_of(saved, shard, summary) for saved in present):
        remember(shard, summary.content)
        return summary
    _tell_difference(shard, present, summary)
    _warn_of_replaced(samples, shard.url)
    _write(shard, rows, summary)
    return summary


def read_summary(shard: Shard) -> Summary | None:
    """The summary in a shard's index; None where no index is known to be of this very tar."""
    stale = []
    for url in index_locations(shard.url):
        try:
            with storage_for(url).open(url) as file:
                return _summary_of(open_parquet(file), shard, url)
        except ABSENT:
            continue
        except _StaleIndexError as reason:
            stale.append(str(reason))
        except StorageError:
            raise
        except UNREADABLE as error:
            stale.append(f"{url} can't be read ({error})")
    for reason in filter(None, stale):
        logger.warning("%s; the tar will be indexed again", reason)
    return None


def read_rows(shard: Shard, columns: list[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
    """Rows [start, stop) of a shard's index; columns that it lacks are left out. Indexes the tar if need be."""
    unreadable = ""
    for _ in range(2):
        for url in index_locations(shard.url):
            try:
                with storage_for(url).open(url) as file:
                    return _read_slice(file, shard, url, columns, start, stop)
            except (*ABSENT, _StaleIndexError):
                continue
            except StorageError:
                raise
            except UNREADABLE as error:
                unreadable = f"{url} can't be read ({error})"
                logger.warning("%s; the tar will be indexed again", unreadable)
        _check_unchanged(shard)
        summary = index_shard(shard, replace=True)
        _check_agrees(shard, summary)
    places = " or ".join(index_locations(shard.url))
    raise BadShardError(f"{shard.url}: " + (unreadable or f"its index can't be kept at {places}"))


def _check_unchanged(shard: Shard) -> None:
    with reading(shard.url):
        if storage_for(shard.url).stat(shard.url) != (shard.size_bytes, shard.etag):
            raise ChangedShardError(shard.url)


def index_locations(url: str) -> list[str]:
    """Where a shard's index may lie, best first."""
    return locations(url, INDEX_SUFFIX)


class _StaleIndexError(Exception):
    """The index belongs to another state of the tar, or to another version of Warpcore. The message may be empty."""


def _check_agrees(shard: Shard, summary: Summary) -> None:
    """Raise BadShardError where the tar is not what planning was told of it."""
    if shard.content not in (None, summary.content) or shard.rows not in (None, summary.rows):
        folder = shard.url.rpartition("/")[0]
        raise BadShardError(
            f"{shard.url} holds other samples ({summary.rows}) than {MANIFEST_NAME} in {folder} says: remove that "
            "file, and start again"
        )


def _summary_of(parquet: pq.ParquetFile, shard: Shard, url: str) -> Summary:
    saved = checked(saved_metadata(parquet.schema_arrow.metadata, _METADATA_KEY), _SAVED)
    if saved["size_bytes"] != shard.size_bytes:
        changed = f"{saved['size_bytes']} -> {shard.size_bytes} bytes"
        raise _StaleIndexError(f"{shard.url} changed since it was indexed ({changed})")
    if saved["version"] < INDEX_VERSION:
        raise _StaleIndexError()  # told once for all tars, see `catalog.told_of_older_indexes`
    if saved["version"] != INDEX_VERSION:
        raise _StaleIndexError(f"{url} has version {saved['version']} instead of {INDEX_VERSION}")
    summary = checked(saved["summary"], _SUMMARY)
    check_index(parquet, summary["rows"], summary["fields"], shard.size_bytes, ROW_GROUP_ROWS)
    if shard.content is not None:
        is_same = summary["content"] == shard.content
    else:
        is_same = saved["etag"] == shard.etag or remembered(shard) == summary["content"]
    if not is_same:
        raise _StaleIndexError()
    names = {name: tuple(summary[name]) for name in ("fields", "nested", "members")}
    found = Summary(**(summary | names))
    if found.lacks_videos:
        raise _StaleIndexError()
    _check_agrees(shard, found)
    return found


def _present_indexes(shard: Shard) -> Iterator[dict]:
    """Version, size, etag and content of every index that is there, of whatever version and state of the tar."""
    for url in index_locations(shard.url):
        try:
            with storage_for(url).open(url) as file:
                saved = checked(saved_metadata(open_parquet(file).schema_arrow.metadata, _METADATA_KEY), _SAVED)
            names = checked(saved["summary"], {"members": list, "fields": list})
            yield saved | {"content": saved["summary"].get("content"), "lacks_videos": _lacks_videos(**names)}
        except ABSENT:
            continue
        except StorageError:
            raise
        except UNREADABLE as error:
            logger.info("%s can't be read (%s)", url, error)


def _lacks_videos(members: Collection[str], fields: Collection[str]) -> bool:
    return not VIDEO_COLUMNS.keys() <= set(fields) and not set(VIDEO_EXTENSIONS).isdisjoint(members)


def has_older_index(shard: Shard) -> bool:
    """Whether an earlier version indexed the tar, without its hash or its videos."""
    present = [saved for saved in _present_indexes(shard) if saved["size_bytes"] == shard.size_bytes]
    return any(saved["version"] < INDEX_VERSION or saved["lacks_videos"] for saved in present)


def _is_of(saved: dict, shard: Shard, summary: Summary) -> bool:
    """Whether an index is of the content of a tar whose etag is another one now."""
    known = saved["version"] == INDEX_VERSION and saved["etag"] != shard.etag and not saved["lacks_videos"]
    return known and (saved["size_bytes"], saved["content"]) == (shard.size_bytes, summary.content)


def _tell_difference(shard: Shard, present: list[dict], summary: Summary) -> None:
    of_this_size = [saved for saved in present if saved["size_bytes"] == shard.size_bytes]
    if summary.renumbered and any(saved["version"] < INDEX_VERSION for saved in of_this_size):
        logger.warning(
            "%s: names repeat in it, and an earlier version put other members together; it is indexed again", shard.url
        )
    if any(saved["version"] == INDEX_VERSION and saved["content"] != summary.content for saved in of_this_size):
        logger.warning("%s changed since it was indexed; it is indexed again", shard.url)


def _warn_of_replaced(samples: list[TarSample], url: str) -> None:
    names = [name for sample in samples for name in sample.replaced]
    if names:
        logger.warning(
            "%s: of names that stand in it more than once, the last member counts, as for tar (%d: %s)",
            url, len(names), ", ".join(names[:3]),
        )  # fmt: skip
    if refused := [sample for sample in samples if sample.problem and sample.problem.startswith(SHARED_KEY)]:
        logger.warning("%s: %d samples can't be used: %s", url, len(refused), refused[0].problem)


def _read_slice(
    file: BinaryIO, shard: Shard, url: str, columns: list[str] | None, start: int, stop: int | None
) -> pa.Table:
    parquet = open_parquet(file)
    summary = _summary_of(parquet, shard, url)
    stop = summary.rows if stop is None else stop
    names = parquet.schema_arrow.names
    columns = names if columns is None else [name for name in columns if name in names]
    first, last = start // ROW_GROUP_ROWS, -(-stop // ROW_GROUP_ROWS)
    check_group_sizes(parquet, first, last, ROW_GROUP_ROWS)
    rows = read_row_groups(file, parquet, range(first, last), columns)
    check_rows(rows, shard.size_bytes)
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


def _refuse_ambiguous(samples: list[TarSample]) -> None:
    """Where a key has two pictures or videos, and two captions, say, it is unclear which belong together."""
    for sample in samples:
        repeated = [name for name in sample.replaced if _extension(name) not in VISUAL_EXTENSIONS]
        visuals = [name for name in VISUAL_EXTENSIONS if name in sample.members]
        if repeated and len(visuals) > 1 and sample.problem is None:
            first, second = (f"{sample.key}.{name}" for name in visuals[:2])
            sample.problem = f"{SHARED_KEY}: {first} and {second}, with two {repeated[0]}"


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _check_visuals(samples: list[TarSample], url: str) -> None:
    if not samples:
        raise BadShardError(f"{url} is an empty tar: it holds no sample")
    if not any(_measured_member(sample) for sample in samples):
        counts = Counter(name for sample in samples for name in sample.members)
        held = ", ".join(f"{number} x .{name}" for name, number in counts.most_common(8)) or "nothing"
        links = f"; {_LINKS}" if any(sample.links for sample in samples) else ""
        raise BadShardError(f"{url} holds no picture or video; its {len(samples)} samples hold {held}{links}")


_LINKS = "some members are links, without content: build the tar with tar --dereference --hard-dereference"


def _make_table(samples: list[TarSample], url: str) -> tuple[pa.Table, list[str]]:
    """The rows of the index, and the .json keys that hold lists or mappings."""
    measured = [_visual(sample) for sample in samples]
    names = pa.array([list(sample.members) for sample in samples], pa.list_(pa.string()))
    columns = {
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "width": pa.array([visual.width for visual in measured], pa.int32()),
        "height": pa.array([visual.height for visual in measured], pa.int32()),
        "problem": pa.array([visual.problem for visual in measured], pa.string()),
        "member_names": names,
    }
    for place, name in enumerate(MEMBER_COLUMNS[1:]):
        values = [[member[place] for member in sample.members.values()] for sample in samples]
        columns[name] = pa.array(values, pa.list_(pa.int64()))
    hidden = hidden_pictures(samples)
    if any(hidden):
        columns[HIDDEN_COLUMN] = pa.array(hidden, pa.list_(pa.string()))
    members = {name for sample in samples for name in sample.members}
    if any(visual.video for visual in measured) or not members.isdisjoint(VIDEO_EXTENSIONS):
        for name, kind in VIDEO_COLUMNS.items():
            columns[name] = pa.array([(visual.video or {}).get(name) for visual in measured], kind)
    fields, nested = gather_fields(samples)
    columns |= {FIELD_PREFIX + name: typed_column(values, f"{url}: {name!r}") for name, values in fields.items()}
    return pa.table(columns), nested


def _visual(sample: TarSample) -> Visual:
    """What the row of a sample says of its picture or video; nothing but why, where it can't be used."""
    if sample.problem:
        return Visual(problem=sample.problem)
    for name in TEXT_EXTENSIONS:
        if sample.members.get(name, (0, 0))[1] > MAX_TEXT_BYTES:
            return Visual(problem=f"{LONG_TEXT}: {sample.key}.{name}")
    extension = _measured_member(sample)
    if extension is None:
        return Visual(problem=_why_no_picture(sample))
    visual: Visual = sample.seen[extension]
    problem = visual.problem
    if problem is None and not (0 < visual.width < MAX_SIDE_PX and 0 < visual.height < MAX_SIDE_PX):
        problem = "its picture has an impossible size"
    if problem is None:
        return visual
    if extension in VIDEO_EXTENSIONS:
        problem = problem.replace(UNDECODABLE_VIDEO, f"{UNDECODABLE_VIDEO}: {sample.key}.{extension}", 1)
    return Visual(problem=clean(problem))


def _why_no_picture(sample: TarSample) -> str:
    if names := dotted(sample):
        return f"{DOTTED_NAME}: {as_read(sample.key, names)}"
    return NO_VISUAL + (f": {_LINKS}" if set(sample.links) & set(VISUAL_EXTENSIONS) else "")


def _measured_member(sample: TarSample) -> str | None:
    """The extension of its picture or video, or of what stands for it."""
    return visual_member(sample.members) or (PICTURE_FACTS if PICTURE_FACTS in sample.members else None)


def has_member(rows: pa.Table, extension: str) -> pa.Array:
    """(rows,) bool: which rows hold a member of this extension, be it in a joined tar."""
    lists = [rows[name].combine_chunks() for name in rows.column_names if name.endswith(MEMBER_COLUMNS[0])]
    found = [pc.filter(pc.list_parent_indices(names), pc.equal(pc.list_flatten(names), extension)) for names in lists]
    places = pa.concat_arrays(found)
    return pc.is_in(pa.array(range(len(rows)), places.type), value_set=places)
