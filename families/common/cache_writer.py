"""Writing a cache: which rows go where, the tars, and the records of what is in them."""

import io
import json
import math
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from families.common.cache_records import Record
from families.common.cached_rows import Copied, OldRows, Sources, hash_sources
from warpcore.data.catalog import Catalog
from warpcore.data.filters import VIDEO_COLUMNS
from warpcore.data.index import index_shard
from warpcore.data.joined import mirrored_name
from warpcore.data.lanes import BucketChoice, draw_seed, sizes_of
from warpcore.data.samples import PICTURE_FACTS, MicroBatch, Sample
from warpcore.data.selection import FURTHER_OF_VIDEOS, Piece, Rows, Selection, make_samples
from warpcore.data.shards import Shard
from warpcore.data.storage import read_ranges, storage_for
from warpcore.errors import UserError
from warpcore.files import naming

CHUNK_ROWS, CHUNK_BYTES = 512, 2**28
"""At most this many rows, or results of about this size, wait in memory until they are written."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a shard."""

    rows: pa.Table
    """Rows of the index, in its order."""
    micro_batches: list[MicroBatch]
    """Of those rows that can be drawn and whose features are not all copied; `state` holds their places in `rows`, the
    variant of the crop, and whether the features of `pictures` and of `texts` are wanted."""
    sources: dict[int, Sources]
    """Of the rows that can be drawn, by place: what their features are made from."""
    copied: dict[int, Copied]
    """What of them is copied, by place."""


@dataclass(frozen=True)
class Work:
    """What is to be encoded.

    batch_size: samples per micro-batch at most. Crop v of a picture is the one that a run from pictures, of the same
    seed, makes in epoch v, or that it had where its features are copied. fields: of each member that the training
    reads beside the picture, its extensions. has_pictures, has_text: whether features of pictures, and of captions,
    are made. sample_bytes: of the features of a sample in memory.
    """

    catalog: Catalog
    selection: Selection
    buckets: BucketChoice
    caption_members: tuple[str, ...]
    seed: int
    variants: int
    batch_size: int
    fields: tuple[tuple[str, ...], ...] = ()
    has_pictures: bool = True
    has_text: bool = True
    sample_bytes: int = 1

    @property
    def chunk_rows(self) -> int:
        """How many rows are encoded, by bucket, before they are written in order."""
        return min(CHUNK_ROWS, max(1, CHUNK_BYTES // self.sample_bytes))

    def chunks(self, number: int, old: OldRows) -> Iterator[Chunk]:
        """The rows of a shard. Reads and hashes what their features are made from, to copy those that `old` has."""
        shard, rows = self.catalog.shard(number), int(self.catalog.rows[number])
        table = self.selection.read(shard, 0, rows, also=["problem", *FURTHER_OF_VIDEOS])
        drawn = self.select(number).numbers
        for start in range(0, rows, self.chunk_rows):
            places = drawn[(drawn >= start) & (drawn < start + self.chunk_rows)] - start
            part = table.slice(start, self.chunk_rows)
            draws = [self._samples(number, part, start, places, variant) for variant in range(self.variants)]
            captions = self.caption_members if self.has_text else ()
            hashes = hash_sources(draws[0], captions, self.fields, self.variants if self.has_pictures else 0)
            sources = dict(zip(places.tolist(), hashes, strict=True))
            copied = {place: old.copy(one) for place, one in sources.items()}
            crops = (self._micro_batches(places.tolist(), draw, copied, variant) for variant, draw in enumerate(draws))
            yield Chunk(part, list(chain.from_iterable(crops)), sources, copied)

    def num_chunks(self, number: int) -> int:
        """How many `chunks` gives."""
        return -(-int(self.catalog.rows[number]) // self.chunk_rows)

    def select(self, number: int) -> Rows:
        """The rows of a shard that can be drawn, and why the others can't."""
        return self.selection.load(self.catalog, Piece(number, 0, int(self.catalog.rows[number])))

    def copied(self, members: Mapping[str, tuple[int, int]]) -> list[str]:
        """Which members of a sample a cache holds too: its caption, its class and its fields."""
        kept = (".txt", ".json", ".cls", *(f".{member}" for member in self.caption_members))
        return [name for name in members if f".{name}".endswith(kept) and name != PICTURE_FACTS]

    def texts(self, number: int, rows: pa.Table) -> list[dict[str, bytes]]:
        """The content of those members, for each row."""
        shard = self.catalog.shard(number)
        columns = [rows[name].to_pylist() for name in ("member_names", "member_offsets", "member_sizes")]
        found = [
            {name: (offset, size) for name, offset, size in zip(*row, strict=True)}
            for row in zip(*columns, strict=True)
        ]
        wanted = [(place, name) for place, members in enumerate(found) for name in self.copied(members)]
        spans = [found[place][name] for place, name in wanted]
        texts: list[dict[str, bytes]] = [{} for _ in found]
        blocks = read_ranges(shard.url, spans, (shard.size_bytes, shard.etag))
        for (place, name), content in zip(wanted, blocks, strict=True):
            texts[place][name] = content
        return texts

    def _samples(self, number: int, part: pa.Table, start: int, places: np.ndarray, variant: int) -> list[Sample]:
        shard, name = self.catalog.shard(number), self.catalog.name(number)
        seeds = [draw_seed(self.seed, variant, name, start + place) for place in places.tolist()]
        return make_samples(part.take(pa.array(places)), [shard] * len(places), seeds)

    def _micro_batches(
        self, places: list[int], samples: list[Sample], copied: dict[int, Copied], variant: int
    ) -> Iterator[MicroBatch]:
        """The micro-batches of rows that lack features; rows that lack the same features are together.

        Without pictures, captions of about one length are together, which takes little padding.
        """
        alike: dict[tuple[tuple[int, ...], bool, bool], list[int]] = defaultdict(list)
        for i, (place, size) in enumerate(zip(places, sizes_of(samples, self.buckets), strict=True)):
            pictures = self.has_pictures and variant not in copied[place].crops
            texts = self.has_text and variant == 0 and not copied[place].has_text
            if pictures or texts:
                alike[size, pictures, texts].append(i)
        for (size, pictures, texts), members in sorted(alike.items()):
            if not self.has_pictures:
                members.sort(key=lambda i: self._caption_bytes(samples[i]))
            for first in range(0, len(members), self.batch_size):
                chosen = members[first : first + self.batch_size]
                state = {"places": [places[i] for i in chosen], "variant": variant}
                state |= {"pictures": pictures, "texts": texts}
                yield MicroBatch(0, size, tuple(samples[i] for i in chosen), 0, state, variant)

    def _caption_bytes(self, sample: Sample) -> int:
        return sum(size for name, (_, size) in sample.members.items() if name in self.caption_members)


def mirrored(out: Path, name: str) -> Path:
    """Where the tar of a shard, given by its name in the catalog, lies in a cache.

    Raises:
        UserError: its name leads out of the cache.
    """
    path = Path(mirrored_name(name))
    if ".." in path.parts:
        raise UserError(f"{name} can't be mirrored in a folder: give the tar another name")
    return out / path


class CacheTar:
    """One tar of a cache while it is written."""

    def __init__(self, file: tarfile.TarFile, record: Record, dtype: str):
        self._file, self.record, self._dtype = file, record, dtype

    def write(
        self,
        chunk: Chunk,
        texts: list[dict[str, bytes]],
        made: list[dict[str, Tensor | bytes]],
        crops: list[dict[int, list[int]]],
        cut: list[bool],
    ) -> None:
        """Write rows.

        made: by member, the float32 features of each row, or their content in an earlier tar; nothing of those that
        have none. crops: by variant, the [top, left] of each row's crops. cut: whether the end of each row's caption
        is cut off.
        """
        of_videos = [name for name in VIDEO_COLUMNS if name in chunk.rows.column_names]
        known = chunk.rows.select(["key", "width", "height", "problem", *of_videos]).to_pylist()
        rows = zip(known, texts, made, crops, cut, strict=True)
        for place, (row, text, features, places, is_cut) in enumerate(rows):
            key, problem = row["key"], row["problem"]
            facts = {name: row[name] for name in ("width", "height")} | ({"problem": problem} if problem else {})
            facts |= {name: row[name] for name in of_videos if row[name] is not None} if row["fps"] else {}
            if places:
                facts["crops"] = [corner for _, corner in sorted(places.items())]
            if features:
                facts["sources"] = asdict(chunk.sources[place]) | {"caption_cut": is_cut}
            self._add(f"{key}.{PICTURE_FACTS}", json.dumps(facts).encode())
            for member, content in text.items():
                self._add(f"{key}.{member}", content)
            for member, feature in sorted(features.items()):
                name = member.partition(".")[0]
                content = feature if isinstance(feature, bytes) else self._encoded(feature, name, key)
                self.record.feature_bytes[name] = self.record.feature_bytes.get(name, 0) + len(content)
                self._add(f"{key}.{member}", content)
            copied = [isinstance(feature, bytes) for feature in features.values()]
            self.record.rows += 1
            self.record.samples += bool(features)
            self.record.reused += bool(copied) and all(copied)
            self.record.partly_reused += any(copied) and not all(copied)
            self.record.cut_captions += bool(features) and is_cut

    def _encoded(self, tensor: Tensor, name: str, key: str) -> bytes:
        kept = tensor.to(getattr(torch, self._dtype))
        if not kept.isfinite().all():
            largest = tensor.abs().max().item()
            raise UserError(
                f"{name} of {key}: a number of size {largest:.4g} can't be stored as {self._dtype}"
                + ("; write --dtype bfloat16" if math.isfinite(largest) else ": what the network made is not finite")
            )
        difference, record = kept.double() - tensor.double(), self.record
        largest = difference.abs().max().item() if difference.numel() else 0.0  # an empty text may have no tokens
        record.largest_error[name] = max(record.largest_error.get(name, 0.0), largest)
        for sums, values in ((record.squared_error, difference), (record.squared, tensor.double())):
            sums[name] = sums.get(name, 0.0) + values.square().sum().item()
        content = io.BytesIO()
        np.save(content, (kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept).numpy())
        return content.getvalue()

    def _add(self, name: str, content: bytes) -> None:
        about = tarfile.TarInfo(name)  # no times or owners: equal content gives equal bytes
        about.size = len(content)
        with naming(self._file.name):
            self._file.addfile(about, io.BytesIO(content))


@contextmanager
def new_tar(path: Path, record: Record, dtype: str) -> Iterator[CacheTar]:
    """A tar that takes its place at `path`, with record and index, when all went well; else nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as content:
            with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as file:
                yield CacheTar(file, record, dtype)
            with naming(aside):
                content.flush()
                os.fsync(content.fileno())
        record.tar_bytes = aside.stat().st_size
        aside.replace(path)
        record.write(path)  # a tar without its own record is written again
    finally:
        aside.unlink(missing_ok=True)
    index_shard(shard_at(path))


def shard_at(path: Path) -> Shard:
    """The tar at a path."""
    return Shard(str(path), *storage_for(str(path)).stat(str(path)))
