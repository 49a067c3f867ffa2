"""The catalog: every shard of a data set in columns, small enough to hand to all processes.

Start-up reads one manifest per folder (`dataset.manifest.parquet`) instead of opening every index. Rank 0 opens the
catalog and broadcasts it; it pickles compactly.
"""

import hashlib
import io
import json
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warpcore.data.bounded_parquet import open_parquet, read_row_groups
from warpcore.data.identity import remembered, same_blocks
from warpcore.data.index import MANIFEST_NAME, UNREADABLE, Summary, has_older_index, index_shard, read_summary
from warpcore.data.index_checks import check_manifest, check_manifest_length, checked, saved_metadata
from warpcore.data.shards import Shard, Source
from warpcore.data.sidecars import ABSENT, locations, write_beside
from warpcore.data.storage import in_parallel, is_remote, real_url, storage_for
from warpcore.data.storage_protocol import StorageError, Version
from warpcore.errors import UserError
from warpcore.progress_bar import ProgressBar
from warpcore.safe_json import parse_json

MANIFEST_VERSION = 3
MAX_LISTED_SHARDS = 10_000
"""The most shards that a fingerprint names, so that checkpoints stay small."""
MANIFEST_WORTHWHILE_SHARDS = 8
"""Opening more indexes than this at start-up leaves a manifest behind for the next start."""
_OF_SHARD = ("size_bytes", "etag", "content", "rows")
"""The columns that a `Shard` has, behind its URL."""
_METADATA_KEY = b"warpcore.manifest"
_SCHEMA = pa.schema(
    [
        ("url", pa.binary()),  # names of files need not be UTF-8
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("rows", pa.int64()),
        ("problems", pa.int64()),
        ("content", pa.string()),
        ("renumbered", pa.bool_()),
        ("names", pa.dictionary(pa.int32(), pa.string())),  # JSON of the summary's names: nearly always the same
    ]
)

logger = logging.getLogger(__name__)


class Catalog:
    """The shards of a data set, sorted by URL, with what their indexes say in short."""

    def __init__(self, table: pa.Table, weights: np.ndarray):
        self._table = table.combine_chunks()
        self.weights = weights
        """(shards,) float64: how often each row of the shard occurs per epoch."""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def urls(self) -> list[str]:
        return [os.fsdecode(url) for url in self._table["url"].to_pylist()]

    def shard(self, number: int) -> Shard:
        row = self._table.slice(number, 1)
        known = (row[name][0].as_py() for name in _OF_SHARD)
        return Shard(os.fsdecode(row["url"][0].as_py()), *known)

    def shards(self) -> Iterator[Shard]:
        """Every shard, in order: faster than one by one."""
        return map(Shard, self.urls, *(self._table[name].to_pylist() for name in _OF_SHARD))

    def versions(self) -> Iterator[tuple[str, Version]]:
        """URL, and size and etag, of every shard."""
        states = zip(*(self._table[name].to_pylist() for name in ("size_bytes", "etag")), strict=True)
        return zip(self.urls, states, strict=True)

    def name(self, number: int) -> str:
        """The shard's URL from the data set's common folder on: moving a data set changes no name, and so no seed."""
        return os.fsdecode(self._table["url"][number].as_py())[self._common :]

    @cached_property
    def rows(self) -> np.ndarray:
        """(shards,) int64."""
        return self._table["rows"].to_numpy()

    @cached_property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @cached_property
    def fields(self) -> frozenset[str]:
        """Scalar .json fields that some sample has."""
        return self._names("fields")

    @cached_property
    def nested(self) -> frozenset[str]:
        """.json keys that hold lists or mappings in some sample."""
        return self._names("nested")

    @cached_property
    def members(self) -> frozenset[str]:
        """Extensions that some sample has."""
        return self._names("members")

    @cached_property
    def contents(self) -> list[tuple[int, str]]:
        """Size and content hash of every shard: what makes two of them the same data."""
        return list(zip(*(self._table[name].to_pylist() for name in ("size_bytes", "content")), strict=True))

    def fingerprint(self, *, by_time: bool = False) -> dict:
        """JSON-able: what must not change on resume. Beyond MAX_LISTED_SHARDS only a digest stands for the shards.

        by_time: as versions before the content hash made it, of etags.
        """
        table = self._identities_by_time() if by_time else self.identities()
        text = json.dumps(table, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        listed = table if len(table) <= MAX_LISTED_SHARDS else None
        identity = {} if by_time else {"identity": "content"}
        return {"digest": digest, "shards": len(self), "rows": self.num_rows, "table": listed} | identity

    def identities(self) -> dict[str, str]:
        """Name -> size, content hash and weight of every shard."""
        return self._described(f"content {content}" for _, content in self.contents)

    def _identities_by_time(self) -> dict[str, str]:
        columns = zip(self._table["etag"].to_pylist(), self._table["renumbered"].to_pylist(), strict=True)
        return self._described(
            etag + (", its members paired by name now" if renumbered else "") for etag, renumbered in columns
        )

    def _described(self, identities: Iterable[str]) -> dict[str, str]:
        columns = (self.urls, self._table["size_bytes"].to_pylist(), identities, self.weights.tolist())
        return {
            url[self._common :]: f"{size} bytes, {identity}" + (f", weight {weight:g}" if weight != 1 else "")
            for url, size, identity, weight in zip(*columns, strict=True)
        }

    def on_this_machine(self) -> "Catalog":
        """The catalog with the etags that the tars have here, where each machine has a copy of its own.

        Raises:
            UserError: a copy holds other data.
        """
        there = {url: version for url, version in self.versions() if not is_remote(url)}
        here = storage_for("/").stats(list(there))
        etags = self._table["etag"].to_pylist()
        for number, url in enumerate(self.urls):
            if url not in there or here.get(url) == there[url]:
                continue
            shard = self.shard(number)
            copy = Shard(url, *here[url]) if url in here else None
            summary = copy and (read_summary(copy) or index_shard(copy))
            if summary is None or (copy.size_bytes, summary.content) != (shard.size_bytes, shard.content):
                raise UserError(
                    f"{url} on {socket.gethostname()} "
                    + ("holds other data than" if copy else "is missing, but is there")
                    + " on the machine of the main process: copy it again"
                )
            etags[number] = copy.etag
        place = self._table.column_names.index("etag")
        return Catalog(self._table.set_column(place, "etag", pa.array(etags, pa.string())), self.weights)

    @cached_property
    def _common(self) -> int:
        first, last = self.shard(0).url, self.shard(len(self) - 1).url
        same = next(
            (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
        )
        return first.rfind("/", 0, same) + 1

    def _names(self, kind: str) -> frozenset[str]:
        texts = self._table["names"].combine_chunks().unique().to_pylist()
        return frozenset(name for text in texts for name in parse_json(text)[kind])


def open_catalog(sources: Sequence[Source], *, keep_copies: bool = False) -> Catalog:
    """The catalog of resolved sources. A shard that has no index of its present content is indexed first.

    keep_copies: a tar of the same content as another one stays; else each content is there once.

    Raises:
        BadShardError: a tar is damaged, or holds no picture or video that is whole.
        UserError: a weight leaves nothing of its source.
    """
    weight_of = {shard.url: source.weight for source in sources for shard in source.shards}
    shards = sorted((shard for source in sources for shard in source.shards), key=lambda shard: shard.url)
    summaries, opened = _known_summaries(shards)
    unknown = [shard for shard in shards if shard.url not in summaries]
    if unknown:
        summaries |= dict(index_shards(unknown))
    if opened + len(unknown) > MANIFEST_WORTHWHILE_SHARDS:
        write_manifests(shards, summaries)
    if not keep_copies:
        shards = _without_doubles([shard for source in sources for shard in source.shards], summaries)
    for source in sources:
        rows = sum(summaries[shard.url].rows for shard in source.shards)
        if rows * source.weight < 1:
            raise UserError(
                f"webdataset_path or prior_path: weight {source.weight:g} of {source.shards[0].url} leaves not one of "
                f"its {rows} rows in an epoch; write at least {1 / rows:.2g}, or leave it out"
            )
    weights = np.array([weight_of[shard.url] for shard in shards], np.float64)
    return Catalog(_as_table(shards, summaries), weights)


def _without_doubles(shards: Sequence[Shard], summaries: dict[str, Summary]) -> list[Shard]:
    """Every tar once, sorted by URL, though it has several names or copies; what is left out is logged.

    Of a file with several names the one counts that is no link, of copies the first one.
    """
    alike: dict[tuple[int, str], list[Shard]] = defaultdict(list)
    doubles: list[tuple[Shard, Shard]] = []
    for shard in sorted(shards, key=lambda shard: real_url(shard.url) != shard.url):
        others = alike[shard.size_bytes, summaries[shard.url].content]
        first = next((other for other in others if same_blocks(shard, other)), None)
        if first is None:
            others.append(shard)
        else:
            doubles.append((shard, first))
    if doubles:
        examples = [f"{shard.url} is {first.url}" for shard, first in doubles[:3]]
        logger.warning(
            "webdataset_path names tars of the same content more than once; %d are read only once: %s%s. To draw rows "
            "more often, write {path: ..., weight: 2}",
            len(doubles), "; ".join(examples), "; ..." if len(doubles) > len(examples) else "",
        )  # fmt: skip
    return sorted((shard for others in alike.values() for shard in others), key=lambda shard: shard.url)


def index_shards(shards: Sequence[Shard]) -> Iterator[tuple[str, Summary]]:
    """Index shards one after the other; shows how far it is, because it may take a while."""
    size = sum(shard.size_bytes for shard in shards)
    logger.info("indexing %d tars (%.2f GB)", len(shards), size / 1e9)
    if told := told_of_older_indexes(shards):
        logger.warning("%s (tools/index_dataset.py does it with several processes)", told)
    what = "indexing (tools/index_dataset.py does it with several processes)"
    with ProgressBar(desc=what, total=size, unit="B", unit_scale=True, delay=2, mininterval=2) as progress:
        for shard in shards:
            yield shard.url, index_shard(shard)
            progress.update(shard.size_bytes)


def told_of_older_indexes(shards: Sequence[Shard]) -> str | None:
    """What to tell of tars that are indexed again because an earlier version did."""
    older = sum(in_parallel(has_older_index, [(shard,) for shard in shards]))
    if not older:
        return None
    return (
        f"{older} of {len(shards)} tars have an index of an earlier version, without a hash of their content or "
        "without what their videos are: they are read and indexed again, once"
    )


def write_manifests(shards: Sequence[Shard], summaries: dict[str, Summary]) -> list[str]:
    """Write one manifest per folder for shards whose summaries are known; returns where they lie.

    What a folder's manifest says of its other tars stays, where they still exist.
    """
    locations = []
    for folder, members in _by_folder(shards).items():
        table = _as_table(members, summaries)
        names = [os.fsencode(shard.url.rpartition("/")[2]) for shard in members]  # the folder may move with it
        table = pa.concat_tables(
            [table.set_column(0, _SCHEMA.field(0), pa.array(names, pa.binary())), _others(folder, names)]
        )
        table = table.unify_dictionaries()
        metadata = {"version": MANIFEST_VERSION, "shards": len(table), "rows": int(table["rows"].to_numpy().sum())}
        content = io.BytesIO()
        table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
        pq.write_table(table, content, compression="zstd")
        locations.append(write_beside(folder + "/", MANIFEST_NAME, content.getvalue()))
    return locations


def _known_summaries(shards: Sequence[Shard]) -> tuple[dict[str, Summary], int]:
    """Summaries by URL from manifests and, where those don't know a shard, from its index; how many were opened."""
    summaries: dict[str, Summary] = {}
    unknown: list[Shard] = []
    for folder, members in _by_folder(shards).items():
        known = _lookup(_read_manifest(folder))
        for shard in members:
            summary = known(shard)
            if summary is None:
                unknown.append(shard)
            else:
                summaries[shard.url] = summary
    opened = {shard.url: summary for shard, summary in read_summaries(unknown).items() if summary}
    return summaries | opened, len(opened)


def read_summaries(shards: Sequence[Shard]) -> dict[Shard, Summary | None]:
    """`read_summary` of every shard."""
    found = in_parallel(read_summary, [(shard,) for shard in shards])
    with ProgressBar(
        found, desc="looking for indexes", total=len(shards), unit=" tars", delay=5, mininterval=2
    ) as progress:
        return dict(zip(shards, progress, strict=True))


def _by_folder(shards: Iterable[Shard]) -> dict[str, list[Shard]]:
    folders: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        folders[shard.url.rpartition("/")[0]].append(shard)
    return folders


def _others(folder: str, names: Sequence[bytes]) -> pa.Table:
    """The rows of a folder's manifest for other tars than these that are still there unchanged."""
    table = _read_manifest(folder)
    table = table.filter(pc.invert(pc.is_in(table["url"], pa.array(names, pa.binary()))))
    urls = [f"{folder}/{os.fsdecode(name)}" for name in table["url"].to_pylist()]
    there = storage_for(folder).stats(urls)
    states = zip(urls, table["size_bytes"].to_pylist(), table["etag"].to_pylist(), strict=True)
    return table.filter(pa.array([there.get(url) == (size, etag) for url, size, etag in states], pa.bool_()))


def _read_manifest(folder: str) -> pa.Table:
    """The folder's manifest; empty where there is none that can be used."""
    for url in locations(folder + "/", MANIFEST_NAME):
        try:
            with storage_for(url).open(url) as file:
                parquet = open_parquet(file)
                check_manifest_length(parquet, file.seek(0, os.SEEK_END))
                if saved_metadata(parquet.schema_arrow.metadata, _METADATA_KEY).get("version") != MANIFEST_VERSION:
                    continue
                table = read_row_groups(file, parquet, range(parquet.num_row_groups), _SCHEMA.names).cast(_SCHEMA)
            check_manifest(table)
            _names_in(table)
            return table
        except ABSENT:
            continue
        except StorageError:
            raise
        except UNREADABLE as error:
            logger.warning("%s can't be read (%s); reading the indexes of its tars instead", url, error)
    return _SCHEMA.empty_table()


def _lookup(table: pa.Table) -> Callable[[Shard], Summary | None]:
    columns = [table[name].to_pylist() for name in ("url", "size_bytes", "etag", "rows", "problems")]
    rest = [table[name].to_pylist() for name in ("content", "renumbered")]
    texts = table["names"].combine_chunks()
    names = _names_in(table)
    entries = dict(zip(columns[0], zip(*columns[1:], *rest, texts.indices.to_pylist(), strict=True), strict=True))

    def find(shard: Shard) -> Summary | None:
        entry = entries.get(os.fsencode(shard.url.rpartition("/")[2]))
        if entry is None:
            return None
        size, etag, rows, problems, content, renumbered, place = entry
        if size != shard.size_bytes or (etag != shard.etag and remembered(shard) != content):
            return None
        summary = Summary(rows, problems, **names[place], content=content, renumbered=renumbered)
        return None if summary.lacks_videos else summary

    return find


def _names_in(table: pa.Table) -> list[dict[str, tuple[str, ...]]]:
    """Fields, nested fields and members of each entry of the dictionary of names. Raises DamagedError."""
    kinds = dict.fromkeys(("fields", "nested", "members"), list)
    texts = table["names"].combine_chunks().dictionary.to_pylist()
    read = (checked(saved_metadata({b"": text.encode()}, b""), kinds) for text in texts)
    return [{kind: tuple(found) for kind, found in names.items()} for names in read]


def _as_table(shards: Sequence[Shard], summaries: dict[str, Summary]) -> pa.Table:
    known = [summaries[shard.url] for shard in shards]
    texts: dict[tuple, str] = {}
    for summary in known:
        key = (summary.fields, summary.nested, summary.members)
        if key not in texts:
            texts[key] = json.dumps(dict(zip(("fields", "nested", "members"), key, strict=True)))
    columns = {
        "url": [os.fsencode(shard.url) for shard in shards],
        "size_bytes": [shard.size_bytes for shard in shards],
        "etag": [shard.etag for shard in shards],
        "rows": [summary.rows for summary in known],
        "problems": [summary.problems for summary in known],
        "content": [summary.content for summary in known],
        "renumbered": [summary.renumbered for summary in known],
    }
    names = pa.array([texts[summary.fields, summary.nested, summary.members] for summary in known], pa.string())
    arrays = [pa.array(values, _SCHEMA.field(name).type) for name, values in columns.items()]
    return pa.Table.from_arrays([*arrays, names.dictionary_encode()], schema=_SCHEMA)
