"""The work of `tools/cache.py`: what the networks make of every sample, written tar by tar."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from families.common.cache_records import Record
from families.common.cache_writer import CacheTar, Chunk, Work, mirrored, new_tar
from families.common.cached_rows import Copied, OldRows, old_tars, tee_locked
from families.common.captions import are_cut
from families.common.features import Dtype
from families.common.training import DiffusionTraining
from tools.cache_features import Maker
from tools.shared_work import SharedWork
from warpcore.data.fields import variant_member
from warpcore.data.loader import Loader
from warpcore.data.reader import Batch, Reader
from warpcore.progress_bar import ProgressBar
from warpcore.random import SampleRandom


@dataclass(frozen=True)
class Encoding:
    """Encodes the shards of a data set whose tars a cache lacks."""

    training: DiffusionTraining
    maker: Maker
    work: Work
    reader: Reader
    out: Path
    dtype: Dtype

    def run(self, shared: SharedWork) -> None:
        """Write the tars of this process that are not there yet; ends where another process has failed."""
        processes = self.training.processes
        by_size = sorted(range(len(self.work.catalog)), key=lambda number: -self.work.catalog.rows[number])
        own = [number for number in by_size[processes.rank :: processes.count] if self.record(number) is None]
        old = OldRows(old_tars(self.out) if own else (), self.maker.of_pictures, self.maker.of_texts)
        chunks, ahead = tee_locked(chunk for number in own for chunk in self.work.chunks(number, old))
        planned = (one for chunk in ahead for one in chunk.micro_batches)
        others = f", {processes.count} processes" if processes.count > 1 else ""
        with (
            Loader(
                planned, self.reader, num_workers=self.training.config.num_workers, device=self.training.device
            ) as loader,
            ProgressBar(
                total=int(sum(self.work.catalog.rows[number] for number in own)),
                unit="row",
                desc=f"caching{others}",
                disable=not processes.is_main,
                mininterval=0.5,
            ) as progress,
        ):
            batches = _checked(loader, shared)
            for number in own:
                self._encode_shard(number, chunks, batches, progress)

    def _encode_shard(
        self, number: int, chunks: Iterator[Chunk], batches: Iterator[Batch], progress: ProgressBar
    ) -> None:
        began, shard = time.perf_counter(), self.work.catalog.shard(number)
        record = Record((shard.size_bytes, shard.content), rejected=dict(self.work.select(number).rejected))
        with new_tar(self.path(number), record, self.dtype) as tar:
            for _ in range(self.work.num_chunks(number)):
                chunk = next(chunks, None)
                if chunk is None:
                    next(batches)  # raises what kept the loader's thread from planning it
                    raise AssertionError("a chunk is missing")
                self._encode_chunk(number, chunk, islice(batches, len(chunk.micro_batches)), tar)
                progress.update(len(chunk.rows))
            record.seconds = time.perf_counter() - began

    def _encode_chunk(self, number: int, chunk: Chunk, batches: Iterator[Batch], tar: CacheTar) -> None:
        copied = [chunk.copied.get(place, Copied()) for place in range(len(chunk.rows))]
        made: list[dict[str, Tensor | bytes]] = [dict(one.members) for one in copied]
        crops = [dict(one.crops) for one in copied]
        cut = [one.caption_cut for one in copied]
        unreadable: set[int] = set()
        for batch in batches:
            places, variant = batch.state["places"], batch.state["variant"]
            for event in batch.events:
                if places[event.place] not in unreadable:
                    tar.record.unreadable.append(f"{event.source}: {event.reason}")
                unreadable.add(places[event.place])
            random = SampleRandom(batch.seeds, self.training.device)
            features = self.maker.make(batch, random, pictures=batch.state["pictures"], texts=batch.state["texts"])
            if batch.state["texts"]:
                for place, is_long in zip(places, self._are_cut(batch), strict=True):
                    cut[place] = is_long
            for i, place in enumerate(places):
                made[place] |= {variant_member(name, variant): rows[i] for name, rows in features.items()}
            if batch.geometry is not None:
                for place, corner in zip(places, batch.geometry.crop.tolist(), strict=True):
                    crops[place][variant] = corner
        for place in unreadable:
            made[place] = {}
        tar.write(chunk, self.work.texts(number, chunk.rows), made, crops, cut)

    def _are_cut(self, batch: Batch) -> list[bool]:
        """Whether each caption of a batch loses its end in the text tower."""
        tower = self.training.networks.get("text")
        if tower is None:
            return [False] * len(batch.captions)
        return are_cut(tower, batch.captions)

    def path(self, number: int) -> Path:
        """The tar of a shard."""
        return mirrored(self.out, self.work.catalog.name(number))

    def record(self, number: int) -> Record | None:
        """What was noted of a shard's tar when it was complete; None until then."""
        return Record.read(self.path(number), self.work.catalog.shard(number))


def _checked(batches: Iterable[Batch], shared: SharedWork) -> Iterator[Batch]:
    for batch in batches:
        shared.check()
        yield batch
