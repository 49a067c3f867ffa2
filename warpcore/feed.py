"""The data of a run: the plan, the loader, and the position in it that a checkpoint keeps."""

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from numbers import Rational
from operator import itemgetter
from typing import Any, NamedTuple

from warpcore.batch_size import split_batch
from warpcore.config import Config
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog, open_catalog
from warpcore.data.clip_buckets import DRAWN_BY_ROW
from warpcore.data.columns import check_missing, column_types, tensor_types
from warpcore.data.disk_cache import DiskCache
from warpcore.data.fields import naming_keys
from warpcore.data.filters import Filter
from warpcore.data.joined import join
from warpcore.data.lanes import most_pixel_bytes
from warpcore.data.loader import Loader
from warpcore.data.needs import DataNeeds
from warpcore.data.optional_members import check_optional, optional_members
from warpcore.data.plan import Plan
from warpcore.data.reader import BadSample, Batch, Reader
from warpcore.data.samples import PICTURE_FACTS, VIDEO_EXTENSIONS, visual_member
from warpcore.data.shards import resolve_sources
from warpcore.data.storage import read_ranges
from warpcore.errors import UserError
from warpcore.processes import Processes
from warpcore.text import counted

SURVEYED_ROWS = 1_000_000
"""Up to this number of rows, a run says at its start how many its filters leave; a pass over more takes too long."""
MARKS = 3
"""A fault is known to all processes two updates later at the latest."""


class _Mark(NamedTuple):
    """The position after an update."""

    update: int
    number: int
    lane_states: dict[int, dict]
    lane_numbers: dict[int, int]


class Feed:
    """Batches for training, validation and samples.

    Args:
        saved: what `state` gave in the checkpoint that the run goes on from.
        needs: what the use case needs of every sample.
    """

    def __init__(self, config: Config, processes: Processes, saved: dict | None, needs: DataNeeds):
        self.config, self.processes, self.needs = config, processes, needs
        self._notes: list[str] = []
        self.micro_batch_size, self.accumulation = split_batch(config, processes.data_count, saved)
        if config.grad_accum_steps not in (None, self.accumulation):
            self._notes.append(
                f"grad_accum_steps is {self.accumulation}, not {config.grad_accum_steps}: the run goes on with the "
                f"checkpoint's micro-batches of {self.micro_batch_size}"
            )
        self.bad_samples = saved["bad_samples"] if saved else 0
        self._bad_in_a_row = saved["bad_in_a_row"] if saved else 0
        self._num_consumed = self._num_read = 0
        """Samples of this start, of all processes, and those among them that could be read."""
        self._last_bad: BadSample | None = None
        self._number = saved["next_micro_batch"] if saved else 0
        self._lane_states = {int(lane): state for lane, state in saved["lane_states"].items()} if saved else {}
        self._lane_numbers: dict[int, int] = {}
        self._consumed: list[tuple[int, int, list[BadSample]]] = []  # (micro-batch number, samples, bad ones)
        self.fault: tuple[int, Exception] | None = None
        """Why this process can't read its data, and the last update that it could read all of."""
        self._marks: deque[_Mark] = deque(maxlen=MARKS)
        self._loader: Loader | None = None
        self._validation_loader: Loader | None = None
        self._to_draw: Batch | None = None
        captions = CaptionGetter.parse(config.captions_getter) if needs.captions else None
        self._columns = tuple(dict.fromkeys(needs.columns))
        buckets = config.buckets(needs.bucket_factor)
        self.buckets = buckets if needs.images else buckets.drawn_by_row()  # what was made of pictures has one size
        self._notes += [DRAWN_BY_ROW] * (self.buckets.by_row and processes.is_main)
        self.plan = self._make_plan(captions)
        self._check_plan(saved)
        notes = processes.on_main(lambda: self._look_at_data(optional_members(needs.extra.values()), bool(saved)))
        self._notes += notes if processes.is_main else []
        self.reader = Reader(
            captions=captions, pictures=needs.images, crop=config.crop_mode, background=config.background,
            max_pixels=config.max_picture_pixels, extra=needs.extra, computed=needs.computed,
            columns=tensor_types(self._types, self._columns), geometry=needs.geometry,
            geometry_remedy=needs.geometry_remedy, frame_stride=self.buckets.stride,
            frame_rate=self.buckets.frame_rate, read_ranges=self._read_ranges,
        )  # fmt: skip

    def batches(self) -> Iterator[Batch]:
        """Training batches of this process, endless, from the current position on.

        Where one can't be read, `fault` says why, and the batch before it stands in for all that follow, also on
        processes that compute each sample with this one: the others wait for them in the middle of an update, which
        has to be completed, and then taken back.
        """
        planned = self.plan.micro_batches(
            rank=self.processes.data_rank, num_processes=self.processes.data_count, start=self._number,
            lane_states=self._lane_states,
        )  # fmt: skip
        self._loader = self._load(planned)
        batches, batch = iter(self._loader), None
        while True:
            try:
                with _explained("training data"):
                    read = next(batches)
            except Exception as error:  # of any kind: the run is saved before it ends with it
                if batch is None:
                    raise
                self.fault = self._marks[-1].update, error
            if self.processes.any_beside(self.fault is not None):
                break
            batch = read
            self._lane_states[batch.lane] = batch.state
            self._lane_numbers[batch.lane] = batch.number
            self._number = batch.number - self.processes.data_rank + self.processes.data_count
            self._notes += batch.notes
            self._consumed.append((batch.number, len(batch.seeds), batch.events))
            yield batch
        while True:
            yield batch

    def mark(self, update: int) -> None:
        """The batches taken so far are those of the updates up to `update`: `rewind` may come back to here."""
        self._marks.append(_Mark(update, self._number, dict(self._lane_states), dict(self._lane_numbers)))

    def find_fault(self) -> tuple[int, Exception] | None:
        """What some process could not read (collective): the last update before that, and the error."""
        own = self.fault and (self.fault[0], self.processes.rank, str(self.fault[1]))
        faults = [fault for fault in self.processes.gather(own) if fault is not None]
        if not faults:
            return None
        update, rank, text = min(faults)
        return update, self.fault[1] if self.fault else UserError(f"process {rank} can't read its data: {text}")

    def rewind(self, update: int) -> None:
        """Go back to the position after `update`, one of the last few."""
        mark = next(mark for mark in self._marks if mark.update == update)
        self._number, self._lane_states, self._lane_numbers = mark.number, mark.lane_states, mark.lane_numbers
        self._consumed = [one for one in self._consumed if one[0] < mark.number]

    def rows_per_epoch(self) -> float:
        """How many rows an epoch draws (collective); of a large data set, a pass over its whole index."""
        return self.processes.on_main_at_length(lambda: self.plan.survey.per_epoch)

    def samples_per_update(self) -> Rational:
        """How many samples an update has, on average over epochs (collective)."""
        if self.config.own_micro_batches is None:
            return self.config.batch_size
        per_micro_batch = self.processes.on_main(lambda: self.plan.survey.samples_per_micro_batch)
        return self.config.own_micro_batches * per_micro_batch

    def validation(self) -> Iterator[tuple[Batch, list[int]]]:
        """One pass over the validation samples: batches, and the places in each that count.

        Every process gets equally many batches, so that they can compute together; what fills up counts nowhere.
        """
        if self._validation_loader is None:
            planned = list(self.plan.validation())
            own = planned[self.processes.data_rank :: self.processes.data_count]
            self._num_own_validation, self._validation_rounds = len(own), -(-len(planned) // self.processes.data_count)
            if not planned:
                return
            self._validation_loader = self._load(own + planned[:1] * (self._validation_rounds - len(own)))
        batches = iter(self._validation_loader)
        for i in range(self._validation_rounds):
            with _explained("validation data"):
                batch = next(batches)
            bad = {event.place for event in batch.events}
            counted = [place for place in range(len(batch.seeds)) if place not in bad]
            self._notes += [f"bad validation sample {event.source}: {event.reason}" for event in batch.events]
            yield batch, counted if i < self._num_own_validation else []

    def to_draw(self, training_data: Any, num_samples: int = 16) -> Batch:
        """Samples of one size, at most `num_samples`, to draw pictures for: of validation, or else of `training_data`.

        training_data: written like `webdataset_path`.
        """
        if self._to_draw is None:
            planned = list(islice(self.plan.validation(), num_samples))
            if planned:
                alike = [sample for each in planned if each.size == planned[0].size for sample in each.samples]
                chosen = replace(planned[0], samples=tuple(alike[:num_samples]))
            else:
                catalog = self._open_catalog(training_data)
                chosen = self.plan.to_draw(catalog, num_samples)
                self._notes += [
                    f"pictures are drawn for {len(chosen.samples)} samples of the training data, the same ones each "
                    "time, as there are none for validation (validation_samples: 16 holds some out)"
                ] * self.processes.is_main
            with _explained("data to draw pictures for"):
                self._to_draw = self.reader.__getitems__(chosen).to(self.processes.device)
        return self._to_draw

    def take_notes(self) -> list[str]:
        """What people should read about the data (collective), each once."""
        notes, self._notes = self._notes, []
        return [note for of_process in self.processes.gather_of_data(notes) for note in of_process]

    def report(self) -> tuple[list[str], UserError | None]:
        """What people should read about the data that all processes consumed since the last call (collective).

        With it the error to end with, where `max_bad_samples` in a row, in the global order of samples, were bad.
        """
        lines, problem = self.take_notes(), None
        consumed, self._consumed = self._consumed, []
        consumed = [one for of_process in self.processes.gather_of_data(consumed) for one in of_process]
        for _, num_samples, events in sorted(consumed, key=itemgetter(0)):
            lines += [f"bad sample {event.source}: {event.reason}" for event in events]
            bad = {event.place: event for event in events}
            self.bad_samples += len(bad)
            self._num_consumed += num_samples
            self._num_read += num_samples - len(bad)
            self._last_bad = events[-1] if events else self._last_bad
            for place in range(num_samples):
                self._bad_in_a_row = self._bad_in_a_row + 1 if place in bad else 0
                if problem is None and place in bad and self._bad_in_a_row >= self.config.max_bad_samples:
                    problem = UserError(
                        f"{self._bad_in_a_row} samples in a row could not be read (max_bad_samples), the last one "
                        f"{bad[place].source}: {bad[place].reason}"
                    )
        return lines, problem

    def check_read(self) -> None:
        """Raises UserError where none of the samples that this start consumed, and has reported, could be read."""
        if self._num_consumed and not self._num_read:
            raise UserError(
                f"none of the {counted(self._num_consumed, 'sample')} of this run could be read: it has learned "
                f"nothing. The last one is {self._last_bad.source}: {self._last_bad.reason}"
            )

    def state(self) -> dict:
        """The position after the batches taken so far, of all lanes, as JSON."""
        merged: dict[int, tuple[int, dict]] = {}
        own = {lane: (self._lane_numbers.get(lane, -1), state) for lane, state in self._lane_states.items()}
        for states in self.processes.gather(own):
            for lane, (number, state) in states.items():
                merged[lane] = max(merged.get(lane, (-2, {})), (number, state), key=lambda pair: pair[0])
        return {
            "micro_batch_size": self.micro_batch_size,
            "next_micro_batch": self.processes.decide(self._number),
            "lane_states": {lane: state for lane, (_, state) in sorted(merged.items())},
            "fingerprint": self.plan.fingerprint,
            "bad_samples": self.bad_samples,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def take_data_wait(self) -> float:
        """Seconds that training waited for data since the last call."""
        return self._loader.data_wait_seconds if self._loader else 0.0

    def close(self) -> None:
        for loader in (self._loader, self._validation_loader):
            if loader is not None:
                loader.close()

    def _make_plan(self, captions: CaptionGetter | None) -> Plan:
        config, needs = self.config, self.needs
        catalog, held_out = (
            getattr(config, key) and self._open_catalog(getattr(config, key), key)
            for key in ("webdataset_path", "validation_path")
        )
        for each in (catalog, held_out):
            if needs.images and each and PICTURE_FACTS in each.members:
                raise UserError(
                    f"{each.urls[0]} is of a cache, which holds what was made of pictures, but this run needs the "
                    "pictures themselves. Where a script can train from a cache, name its folder alone"
                )
            if each and not needs.videos and visual_member(each.members) in VIDEO_EXTENSIONS:
                raise UserError(
                    f"{each.urls[0]} holds videos, but this script trains on pictures. Make pictures of the videos "
                    "with python3 tools/build_dataset.py FOLDER OUT --frames-every 10, or take a script that trains "
                    "on clips"
                )
        self.catalog, self.validation_catalog = catalog, held_out
        asked = [*self._columns, *(captions.columns if captions else ())]
        self._types = self.processes.on_main(lambda: column_types(catalog, asked))
        self._read_ranges = read_ranges
        if config.cache_path:
            needed = [version for each in (catalog, held_out) if each for version in each.versions()]
            self._read_ranges = DiskCache(config.cache_path, int(config.cache_size_gb * 1e9), needed)
        return Plan(
            catalog,
            micro_batch_size=self.micro_batch_size,
            buckets=self.buckets,
            filters=[Filter.parse(entry) for entry in config.dataset_filters],
            captions=captions,
            required_members=[field.suffixes for field in needs.extra.values()],
            counted_members=list(optional_members(needs.extra.values())),
            columns=self._types,
            member_keys=naming_keys(needs.extra.values()),
            max_picture_pixels=config.max_picture_pixels,
            videos=needs.videos,
            seed=config.seed,
            validation=held_out,
            validation_by_key=needs.validation_by_key,
            validation_samples=config.validation_samples,
            num_lanes=config.lanes,
            group_rows=config.shard_group_rows,
        )

    def _look_at_data(self, optional: dict[str, str], resumed: bool) -> list[str]:
        """What to tell of the data at the start; called on the main process."""
        if self.plan.num_rows_on_file > SURVEYED_ROWS:
            return check_optional(optional, self.catalog, None, resumed=resumed)
        found = self.plan.survey
        check_missing(found.missing, found.passed, "training")
        if self._types and self.plan.has_validation:
            held_out = self.plan.validation_survey
            check_missing(held_out.missing, held_out.passed, "validation")
        told = check_optional(optional, self.catalog, found.members, found.passed, resumed)
        if found.buckets and self.config.validation_path is not None:
            told = [f"validation data: {self.plan.validation_survey}", *told]
        return [f"training data: {found}", *told]

    def some_captions(self, count: int) -> list[tuple[str, str]]:
        """(shard, caption) of the training data: all, or about `count` of more; read by the main process for all."""
        if self.reader.captions is None:
            return []
        return self.processes.on_main(lambda: self.reader.captions_of(self.plan.some_samples(count)))

    def _open_catalog(self, path: Any, key: str = "webdataset_path") -> Catalog:
        """The catalog of a path, with the further tars that a key of the config has.

        One process reads the indexes, which may be many; the others get the result.
        """

        def opened() -> Catalog:
            found = open_catalog(resolve_sources(path, key))
            further = self.needs.further.get(key, ())
            return join(found, [(one, open_catalog(resolve_sources(one.folder), keep_copies=True)) for one in further])

        return self._on_this_machine(self.processes.on_main(opened))

    def _on_this_machine(self, catalog: Catalog) -> Catalog:
        """The main process's catalog for the copies of the tars that this machine may have.

        Of the processes of a machine the first one reads what has to be read; the others find it remembered.

        Raises:
            UserError: on all processes, where the copy of one holds other data.
        """
        hosts = self.processes.gather(socket.gethostname())
        own, is_first = hosts[self.processes.rank], hosts.index(hosts[self.processes.rank]) == self.processes.rank
        for turn in (True, False) if len(set(hosts)) > 1 else ():
            fault = None
            if is_first == turn and own != hosts[0]:
                try:
                    catalog = catalog.on_this_machine()
                except (UserError, OSError) as error:
                    fault = str(error)
            if faults := list(filter(None, self.processes.gather(fault))):
                raise UserError("; ".join(dict.fromkeys(faults)))
        return catalog

    def _check_plan(self, saved: dict | None) -> None:
        if saved is None:
            return
        # The main process decides: on another machine, copies of the tars have other times of change.
        difference = self.processes.on_main(lambda: self.plan.difference(saved["fingerprint"]))
        if difference is None:
            return
        if self.config.on_data_change == "error":
            raise UserError(
                f"the data is not what the checkpoint was made with: {difference}. Restore it, or write "
                "on_data_change: new_epoch to start a fresh epoch with the weights and the update number kept"
            )
        self._notes.append(f"the data changed ({difference}): a fresh epoch starts")
        epoch = max((state["epoch"] for state in self._lane_states.values()), default=-1) + 1
        self._lane_states = self.plan.fresh_lane_states(start=self._number, epoch=epoch)

    def _load(self, planned) -> Loader:
        reads_clips = self.needs.videos and self.needs.images
        return Loader(
            planned, self.reader, num_workers=self.config.num_workers, device=self.processes.device,
            batch_bytes=most_pixel_bytes(self.buckets, self.micro_batch_size) if reads_clips else 0,
        )  # fmt: skip


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """A disk that fails is no fault of the program."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"the {what} can't be read any more: {error}. Restore it and start the same command again"
        ) from error
