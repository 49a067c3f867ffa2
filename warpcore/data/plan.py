"""The plan: which rows make up which micro-batch. Pure: it reads index rows, never a picture."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from math import gcd
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog
from warpcore.data.clip_buckets import ClipBuckets
from warpcore.data.filters import Filter
from warpcore.data.lanes import BucketChoice, Lane, Recipe, fresh_state
from warpcore.data.samples import MicroBatch, Sample
from warpcore.data.selection import (
    PASS_ROWS,
    Piece,
    Rows,
    Selection,
    as_pieces,
    choose_by_hash,
    cut,
    make_samples,
)
from warpcore.data.storage import real_url
from warpcore.data.survey import Survey, hold_out, survey
from warpcore.errors import UserError
from warpcore.random import stable_hash

__all__ = ["MicroBatch", "Plan", "Sample", "describe_difference"]

PLAN_VERSION = 2
MAX_LANES = 64
ROWS_PER_LANE = 65_536
"""A data set of fewer than twice as many rows has a single lane."""
GROUP_ROWS_OF_ALL_LANES = 1_048_576
"""What a process that serves every lane holds in memory at most, in index rows (about 150 bytes each)."""
MAX_REPLAYED = 100_000
"""Micro-batches that a lane may be behind where a run goes on: no run saves such a state."""
LOOKED_AT_SHARDS = 16
"""Of how many shards `some_samples` takes some, besides as many that are the first of their folder."""


class Plan:
    """The order of a data set for one run.

    Args:
        catalog: from `open_catalog(resolve_sources(webdataset_path))`.
        micro_batch_size: samples per micro-batch, all of one bucket; None where every bucket has a size of its own.
        buckets: gives every picture or clip its size.
        filters: conditions on index columns, in order; the first that rejects a row is the one that is told.
        captions: where captions come from; a row without that member is rejected.
        required_members: further members that a row must have, such as a mask; of several extensions, any one.
        max_picture_pixels: rows with larger pictures are rejected.
        seed: of the run.
        validation: the catalog of `validation_path`.
        validation_samples: how many rows of the data set are kept for validation where there is no `validation`.
        counted_members: members of which the survey counts how many rows have them.
        columns: index columns whose values samples bring along, as `column_types` gives them.
        videos: whether rows of videos are taken.
        validation_by_key: the seeds of validation samples follow from their keys alone, not from the run.
        member_keys: the config keys that name required members, by the first extension of each, for error messages.
        num_lanes, group_rows: by default they follow from the number of rows.

    Raises:
        UserError: a filter, caption or member that no sample has, or settings that leave nothing to train on.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        micro_batch_size: int | None,
        buckets: BucketChoice,
        filters: Sequence[Filter] = (),
        captions: CaptionGetter | None = None,
        required_members: Sequence[str | Sequence[str]] = (),
        max_picture_pixels: int | None = None,
        seed: int = 0,
        validation: Catalog | None = None,
        validation_samples: int = 0,
        num_lanes: int | None = None,
        group_rows: int | None = None,
        counted_members: Sequence[str] = (),
        columns: Mapping[str, pa.DataType] = MappingProxyType({}),
        member_keys: Mapping[str, str] = MappingProxyType({}),
        videos: bool = True,
        validation_by_key: bool = False,
    ):
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(f"micro_batch_size is at least 1, found {micro_batch_size}")
        if validation is not None and validation_samples:
            raise UserError("give validation_path or validation_samples, not both")
        wanted = [*(captions.members if captions else []), *required_members]
        members = dict.fromkeys((one,) if isinstance(one, str) else tuple(one) for one in wanted)
        selection = Selection(
            tuple(filters),
            tuple(members),
            max_picture_pixels,
            columns=dict(columns),
            required_columns=captions.columns if captions else (),
            videos=videos,
            buckets=buckets if isinstance(buckets, ClipBuckets) else None,
        )
        selection.check(catalog, captions, member_keys)
        if validation is not None:
            selection.check(validation, captions, member_keys)
        if validation is None:
            held_out = hold_out(catalog, selection, validation_samples) if validation_samples else {}
        else:
            held_out = _shared_shards(catalog, validation)
        self._unheld = selection
        self._validation, self._validation_by_key = validation, validation_by_key
        self._captions = captions
        self._counted_members = counted_members
        self._validation_samples = validation_samples
        self.num_lanes = num_lanes or default_lanes(catalog.num_rows)
        self.recipe = Recipe(
            catalog=catalog,
            selection=replace(selection, held_out=held_out),
            buckets=buckets,
            micro_batch_size=micro_batch_size,
            seed=seed,
            num_lanes=self.num_lanes,
            group_rows=group_rows or GROUP_ROWS_OF_ALL_LANES // self.num_lanes,
        )
        empty = [number for number, pieces in enumerate(self.recipe.lanes) if not len(pieces)]
        if empty:
            raise UserError(f"lanes is {self.num_lanes}, more than the data set has rows to deal; lower it")

    @cached_property
    def survey(self) -> Survey:
        """What a pass over the whole index finds: rows, and why others are rejected. Slow for large data sets."""
        return survey(self.recipe.catalog, self.recipe.selection, self._counted_members)

    @cached_property
    def validation_survey(self) -> Survey:
        """The same of the rows of `validation_path`; without one, of those that are held out."""
        if self._validation is not None:
            return survey(self._validation, self._unheld)
        every = survey(self.recipe.catalog, self._unheld)
        held = every.passed - self.survey.passed
        return Survey(held, held, missing=every.missing - self.survey.missing)

    def some_samples(self, count: int) -> list[Sample]:
        """Training samples to look at: all, if `count` is not below the rows of the index, else some of many shards.

        The first shard of every folder is among them, as a small source has a folder of its own.
        """
        catalog, selection = self.recipe.catalog, self.recipe.selection
        numbers = np.arange(len(catalog))
        if catalog.num_rows > count:
            folders = {os.path.dirname(url): number for number, url in reversed(list(enumerate(catalog.urls)))}
            spread = np.linspace(0, len(catalog) - 1, LOOKED_AT_SHARDS).astype(int).tolist()
            numbers = sorted({*list(folders.values())[:LOOKED_AT_SHARDS], *spread})
        samples = []
        for number in numbers:
            rows = selection.load(catalog, Piece(int(number), 0, min(PASS_ROWS, int(catalog.rows[number]))))
            share = count if catalog.num_rows <= count else count // len(numbers)
            chosen = np.linspace(0, len(rows.numbers) - 1, min(share, len(rows.numbers))).astype(int)
            shards = [catalog.shard(number)] * len(chosen)
            samples += make_samples(rows.table.take(pa.array(chosen)), shards, [0] * len(chosen))
        return samples

    @property
    def largest_micro_batch(self) -> int | None:
        """Samples of a micro-batch at most, where buckets have micro-batch sizes of their own; else None."""
        return max(self.recipe.buckets.micro_batch_sizes.values(), default=None)

    @property
    def num_rows_on_file(self) -> int:
        """Rows of the index before filters."""
        return self.recipe.catalog.num_rows

    @property
    def num_rows(self) -> int:
        """Training rows after filters. Makes the survey."""
        return self.survey.passed

    @cached_property
    def fingerprint(self) -> dict:
        """JSON-able: everything that must not change on resume. Compare with `describe_difference`."""
        recipe, buckets = self.recipe, self.recipe.buckets
        catalog, held = recipe.catalog, self._validation
        return {
            "plan_version": PLAN_VERSION,
            "seed": recipe.seed,
            "micro_batch_size": recipe.micro_batch_size,
            "lanes": self.num_lanes,
            "shard_group_rows": recipe.group_rows,
            "dataset_filters": [str(condition) for condition in recipe.selection.filters],
            "captions_getter": self._captions.setting if self._captions else None,
            "required_members": [list(suffixes) for suffixes in recipe.selection.required_members],
            "max_picture_pixels": recipe.selection.max_picture_pixels,
            "bucket_sizes": [list(size) for size in buckets.sizes],
            "bucketeer_random_ratio": getattr(buckets, "random_ratio", 0.0),
            "validation_samples": self._validation_samples,
            "shards": catalog.fingerprint(),
            "validation_shards": held.fingerprint() if held else {},
            **buckets.settings,
        } | ({"copies_of_validation": copies} if held and (copies := _copies(catalog, held)) else {})

    def difference(self, saved: dict) -> str | None:
        """What differs from the fingerprint in a checkpoint, as an error message; None where nothing does.

        One of an earlier version, which has etags in the place of content hashes, is compared with the present etags.
        """
        current = dict(self.fingerprint)
        try:
            for name, catalog in (("shards", self.recipe.catalog), ("validation_shards", self._validation)):
                if catalog is not None and saved.get(name) and "identity" not in saved[name]:
                    current[name] = catalog.fingerprint(by_time=True)
            return describe_difference(saved, current)
        except (TypeError, AttributeError, LookupError) as error:  # anyone may have written the checkpoint
            return f"the checkpoint's record of the data is damaged ({error})"

    def micro_batches(
        self, *, rank: int = 0, num_processes: int = 1, start: int = 0, lane_states: dict[int, dict] | None = None
    ) -> Iterator[MicroBatch]:
        """Endless: the micro-batches of a rank (number mod num_processes == rank), from global number `start` on.

        lane_states: of every lane the state of its last micro-batch below `start`. A lane without one is replayed from
            its beginning, which takes time.

        Raises:
            UserError: a state that is later than `start`, or nothing in the data set can be drawn.
        """
        states = {int(number): state for number, state in (lane_states or {}).items()}
        if unknown := sorted(set(states) - set(range(self.num_lanes))):
            raise UserError(f"there is no lane {unknown[0]}: the plan has {self.num_lanes} lanes")
        shared = gcd(self.num_lanes, num_processes)
        lanes = {
            number: Lane(self.recipe, number, states.get(number))
            for number in range(self.num_lanes)
            if number % shared == rank % shared
        }
        for lane in lanes.values():
            self._wind(lane, start)
        for number in count(start):
            lane = lanes.get(number % self.num_lanes)
            if lane is not None:
                micro_batch = lane.next_micro_batch(number)
                if number % num_processes == rank:
                    yield micro_batch

    def _wind(self, lane: Lane, start: int) -> None:
        """Move a lane on to its first micro-batch of a number >= start."""
        given = len(range(lane.number, start, self.num_lanes))
        if lane.emitted > given:
            raise UserError(
                f"the state of lane {lane.number} is after {lane.emitted} of its micro-batches, but only {given} of "
                f"them come before number {start}"
            )
        if lane.emitted and given - lane.emitted > MAX_REPLAYED:
            raise UserError(f"the state of lane {lane.number} is {given - lane.emitted} micro-batches before {start}")
        while lane.emitted < given:
            lane.next_micro_batch(lane.number + lane.emitted * self.num_lanes)

    def fresh_lane_states(self, *, start: int, epoch: int) -> dict[int, dict]:
        """States that begin an epoch at global number `start`: `on_data_change: new_epoch`."""
        return {
            number: fresh_state(epoch, len(range(number, start, self.num_lanes))) for number in range(self.num_lanes)
        }

    @property
    def has_validation(self) -> bool:
        return self._validation is not None or self._validation_samples > 0

    def validation(self) -> Iterator[MicroBatch]:
        """One fixed pass over the validation rows, the same every time; the last of a bucket may be partial."""
        numbers = count()

        def emit(size: tuple[int, ...], samples: list[Sample]) -> MicroBatch:
            return MicroBatch(next(numbers), size, tuple(samples), 0, {}, 0)

        waiting: dict[tuple[int, ...], list[Sample]] = {}
        found = kept = 0
        for samples in self._validation_rows():
            found += len(samples)
            for size, sample in zip(self.recipe.sizes_of(samples), samples, strict=True):
                if size is None:
                    continue
                kept += 1
                waiting.setdefault(size, []).append(sample)
                if len(waiting[size]) == self.recipe.micro_batch_size_of(size):
                    yield emit(size, waiting.pop(size))
        if self._validation is not None and not found:
            raise UserError(f"no row of validation_path can be drawn: {survey(self._validation, self._unheld)}")
        if found and not kept:
            raise UserError(
                f"bucket_config: its probabilities keep none of {found} samples for validation: raise them, or hold "
                "out more"
            )
        for size, samples in sorted(waiting.items()):
            yield emit(size, samples)

    def _validation_rows(self) -> Iterator[list[Sample]]:
        """The validation samples of one piece after the other; no more than that is in memory."""
        held_out = self.recipe.selection.held_out
        catalog = self.recipe.catalog if self._validation is None else self._validation
        for piece in as_pieces(cut(catalog, PASS_ROWS)) if self.has_validation else ():
            if self._validation is None and piece.shard not in held_out:
                continue
            rows = self._unheld.load(catalog, piece)
            places = np.arange(len(rows.numbers))
            if self._validation is None:
                places = places[np.isin(rows.numbers, held_out[piece.shard])]
            samples = self._samples(catalog, piece.shard, rows, places)
            by_key = [replace(one, seed=stable_hash("validation", one.key)) for one in samples]
            yield by_key if self._validation_by_key else samples

    def _samples(self, catalog: Catalog, shard: int, rows: Rows, places: np.ndarray) -> list[Sample]:
        """Rows of a shard as samples for validation or drawing: always with the same seeds."""
        name, numbers = catalog.name(shard), rows.numbers[places].tolist()
        seeds = [stable_hash(self.recipe.seed, "validation", name, row) for row in numbers]
        return make_samples(rows.table.take(pa.array(places)), [catalog.shard(shard)] * len(places), seeds)

    def to_draw(self, catalog: Catalog, count: int) -> MicroBatch:
        """At most `count` rows of a training catalog, of one bucket, chosen by the hash of their keys."""
        chosen, _ = choose_by_hash(catalog, self._unheld, count)
        samples: list[Sample] = []
        for shard, numbers in chosen.items():
            rows = self._unheld.load(catalog, Piece(shard, 0, int(catalog.rows[shard])))
            samples += self._samples(catalog, shard, rows, np.flatnonzero(np.isin(rows.numbers, numbers)))
        sizes = self.recipe.sizes_of(samples)
        kept = Counter(size for size in sizes if size is not None)
        if not kept:
            raise UserError("bucket_config: its probabilities keep no sample to draw pictures for: raise them")
        commonest = kept.most_common(1)[0][0]
        alike = [sample for sample, size in zip(samples, sizes, strict=True) if size == commonest]
        return MicroBatch(0, commonest, tuple(alike), 0, {}, 0)


def _shared_shards(catalog: Catalog, validation: Catalog) -> dict[int, np.ndarray]:
    """All rows of the shards that validation_path names too, or copies of: shard number -> row numbers."""
    held = set(validation.contents)
    return {number: np.arange(catalog.rows[number]) for number, one in enumerate(catalog.contents) if one in held}


def _copies(catalog: Catalog, validation: Catalog) -> list[str]:
    """The names of the shards that are copies of some in validation_path, at other places."""
    files, held = {real_url(url) for url in validation.urls}, set(validation.contents)
    return [
        catalog.name(number)
        for number, (url, content) in enumerate(zip(catalog.urls, catalog.contents, strict=True))
        if content in held and real_url(url) not in files
    ]


def default_lanes(num_rows: int) -> int:
    """A power of two, so that it shares a divisor with the usual numbers of processes; 1 for a small data set."""
    return min(MAX_LANES, 1 << max(0, (num_rows // ROWS_PER_LANE).bit_length() - 1))


def describe_difference(saved: dict, current: dict) -> str | None:
    """What differs between the fingerprints of a checkpoint and of this run, as a message; None where nothing does."""
    differences = []
    for name in sorted(saved.keys() | current.keys()):
        before, now = saved.get(name), current.get(name)
        if name == "required_members":  # every row has a picture, of extensions that are more now than once
            before, now = ([suffixes for suffixes in one or [] if "jpg" not in suffixes] for one in (before, now))
        if before == now:
            continue
        if name in ("shards", "validation_shards"):
            differences += _shard_differences(before or {}, now or {})
        else:
            differences.append(f"{name} changed: {before!r} -> {now!r}")
    return "; ".join(differences) or None


def _shard_differences(saved: dict, current: dict, shown: int = 3) -> list[str]:
    """What differs between two fingerprints of catalogs."""
    if any("digest" in one and one.get("table") is None for one in (saved, current)):
        counts = [f"{one.get('shards', 0)} shards with {one.get('rows', 0)} rows" for one in (saved, current)]
        return [f"shards changed: {counts[0]} -> {counts[1]}, of other names, sizes, times or weights"]
    before, now = saved.get("table", {}), current.get("table", {})
    both = [name for name in before if name in now]
    kinds = {
        "changed": [f"{name} changed: {before[name]} -> {now[name]}" for name in both if before[name] != now[name]],
        "are gone": [f"{name} is gone" for name in before if name not in now],
        "are new": [f"{name} is new" for name in now if name not in before],
    }
    texts = []
    for what, found in kinds.items():
        texts += [f"shard {text}" for text in found[:shown]]
        texts += [f"{len(found) - shown} more shards {what}"] if len(found) > shown else []
    joined = [one.get("joined", {}) for one in (saved, current)]
    for name in sorted({*joined[0], *joined[1]}):
        pair = [one.get(name, {}) for one in joined]
        texts += (
            [f"of the tars with {name}: {text}" for text in _shard_differences(*pair)] if pair[0] != pair[1] else []
        )
    return texts
