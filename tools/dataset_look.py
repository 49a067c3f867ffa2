"""What a page of data shows, found by the code that a run reads its data with: its plan, its reader and its hooks.

The result of `look` is what JSON can say. Rows are known by their numbers, in the order of the catalog.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from math import prod
from typing import Any

import numpy as np

from families.common.captions import cut_places
from families.common.pictures import to_pictures, to_uint8
from families.common.sample_fields import FromField
from tools.dataset_pictures import (
    BESIDE_PX,
    CROP_PX,
    WHOLE_PX,
    FingerprintField,
    WholeField,
    WholePicture,
    clip_uri,
    picture_uri,
)
from tools.dataset_rows import (
    DRAWN,
    MAX_TEXT,
    NOT_DRAWN,
    Drawn,
    Listed,
    bucket_list,
    column_texts,
    draw,
    histograms,
    list_rows,
    row_lists,
)
from tools.dataset_training import Bounds, Training
from tools.near_duplicates import Fingerprint, duplicates
from tools.shared_work import ALONE
from warpcore.batch_size import split_batch
from warpcore.config import Config
from warpcore.data.fields import PictureField
from warpcore.data.lanes import Recipe
from warpcore.data.reader import Batch, Reader
from warpcore.data.samples import MicroBatch, Sample, visual_member
from warpcore.data.selection import Selection, make_samples
from warpcore.data.storage import in_parallel
from warpcore.data.tars import clean
from warpcore.feed import Feed

READ_HERE = 5_000
"""Samples whose caption and picture are read, of a data set on this machine."""
AT_ONCE = 16
"""Samples that are read together."""
MOST_BYTES = 2**26
"""Of the pixels of those that are shown."""
SHOWN_GROUPS, SHOWN_OF_GROUP = 60, 6
"""Of pictures that look the same."""
EXAMPLES = 6
"""Of the rows that a condition leaves out."""
_WHOLE = "whole picture"


def look(training: Training, bounds: Bounds) -> dict[str, Any]:
    """Everything that the page shows, see docs/inspect_dataset.md.

    Raises:
        UserError: as the start of the training would.
    """
    feed = Feed(_of_one_process(training.config), ALONE, None, training.needs)
    recipe = feed.plan.recipe
    listed = list_rows(recipe, bounds.rows)
    drawn = draw(recipe, listed)
    shown = _over_buckets(drawn, bounds.pictures)
    most = bounds.read if bounds.read is not None else bounds.pictures if training.sampling.remote else READ_HERE
    read = list(dict.fromkeys([*shown, *drawn.samples]))[: max(most, len(shown))]
    seen = _Reading(training, feed.reader, drawn)
    seen.read(read)
    samples, alike = seen.show(shown), seen.duplicates()
    columns, most = column_texts(listed.columns)
    short = f"There is much text in the columns: this page has, and searches, the first {most} characters of each."
    return {
        "title": _title(training),
        "told": [*map(clean, [*training.told, *feed.take_notes(), *([short] if most < MAX_TEXT else [])])],
        "about": {
            "shards": training.sampling.shards, "looked_at": len(training.sampling.chosen),
            "rows": recipe.catalog.num_rows, "listed": len(listed), "drawn": len(drawn.samples), "read": len(read),
            "shown": len(shown), "crop_mode": training.config.crop_mode, "has_captions": training.needs.captions,
        },
        "rows": row_lists(listed, drawn, seen.captions),
        "columns": [{"name": clean(name), "values": values} for name, values in columns.items()],
        "histograms": [*histograms(listed, drawn)],
        "buckets": bucket_list(drawn, feed.buckets.sizes, recipe.micro_batch_size_of),
        "left_out": [*_left_out(feed.reader, recipe, listed)],
        "samples": samples,
        "duplicates": alike,
        "thumbs": seen.thumbs({row for group in alike[:SHOWN_GROUPS] for row in group[:SHOWN_OF_GROUP]} - {*shown}),
        "dropped": sorted(seen.dropped),
        "cut": seen.cut(),
        "unreadable": [{"row": row, "reason": clean(reason)} for row, reason in sorted(seen.unreadable.items())],
    }  # fmt: skip


def _of_one_process(config: Config) -> Config:
    """The config for one process with the micro-batches that the run would have."""
    processes = config.processes if isinstance(config.processes, int) else 1
    micro, _ = split_batch(config, max(1, processes // config.processes_per_sample), None)
    changes = {"processes": None, "grad_accum_steps": None, "micro_batch_size": micro}
    changes |= {"micro_batches_per_update": 1} if micro is None else {"batch_size": micro}
    return config.for_any_processes().model_copy(update=changes)


def _title(training: Training) -> str:
    paths = training.config.webdataset_path
    listed = paths if isinstance(paths, list) else [paths]
    named = [str(one["path"] if isinstance(one, dict) else one) for one in listed]
    return clean(", ".join(named[:3]) + ", ..." * (len(named) > 3))


def _over_buckets(drawn: Drawn, count: int) -> list[int]:
    """So many rows, of each bucket as many, as far as they go, in the order of the draws."""
    of_bucket: dict[tuple[int, ...], list[int]] = {}
    for row, size in drawn.sizes.items():
        of_bucket.setdefault(size, []).append(row)
    rounds = zip_longest(*(rows[:count] for rows in of_bucket.values()))
    return sorted([row for row in chain.from_iterable(rounds) if row is not None][:count], key=drawn.sizes.get)


def _groups(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _in_utf16(text: str) -> int:
    """The length of a text as browsers count it."""
    return len(text.encode("utf-16-le")) // 2


class _Reading:
    """What is read of samples, as the training would read them."""

    def __init__(self, training: Training, reader: Reader, drawn: Drawn):
        self.training, self.reader, self.drawn = training, reader, drawn
        self.captions: dict[int, str] = {}
        """Row -> its caption as it is drawn, before it is perhaps left out."""
        self.dropped: set[int] = set()
        """Rows whose caption is left out in their first draw."""
        self.prints: dict[int, Fingerprint] = {}
        self.unreadable: dict[int, str] = {}

    def read(self, rows: Sequence[int]) -> None:
        """Read captions and pictures, these only to compare them."""
        of_whole = {name: one for name, one in self.training.needs.extra.items() if isinstance(one, FromField)}
        field = FingerprintField(self.reader.max_pixels, self.reader.background)
        reader = replace(
            self.reader, pictures=False, geometry=False, computed={}, columns={}, extra={**of_whole, _WHOLE: field}
        )
        groups = [(some, self._micro_batch(some, (1, 1))) for some in _groups(rows, AT_ONCE)]
        batches = in_parallel(reader.__getitems__, [(micro_batch,) for _, micro_batch in groups])
        for (some, _), batch in zip(groups, batches, strict=True):
            for place, row in self._readable(some, batch):
                self.prints[row] = batch.extra[_WHOLE][place]

    def show(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Read samples whole, and show them."""
        field = WholeField(self.reader.max_pixels, self.reader.background)
        reader = replace(self.reader, computed={}, extra={**self.reader.extra, _WHOLE: field})
        of_bucket: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            of_bucket.setdefault(self.drawn.sizes[row], []).append(row)
        found = {}
        for size, own in of_bucket.items():
            for some in _groups(own, max(1, min(AT_ONCE, MOST_BYTES // (3 * prod(size))))):
                batch = reader.__getitems__(self._micro_batch(some, size))
                beside = self._beside(batch)
                for place, row in self._readable(some, batch):
                    found[row] = self._shown(batch, place, row, {name: one[place] for name, one in beside.items()})
        return [found.get(row) or {"row": row, "problem": clean(self.unreadable.get(row, ""))} for row in rows]

    def duplicates(self) -> list[list[int]]:
        """Groups of rows whose pictures look the same."""
        rows = [*self.prints]
        return [[rows[place] for place in group] for group in duplicates([*self.prints.values()])]

    def thumbs(self, rows: Iterable[int]) -> dict[int, str]:
        """Row -> its whole picture."""
        reader, samples = _of_whole_pictures(self.reader), self.drawn.samples
        found = {row: _example(reader, samples[row]) for row in sorted(rows)}
        return {row: one["whole"] for row, one in found.items() if "whole" in one}

    def cut(self) -> list[dict[str, int]]:
        """Captions that the text encoder does not read to their end, and how many characters it reads."""
        if self.training.text is None:
            return []
        rows = [row for row in self.captions if row not in self.dropped]
        places = cut_places(self.training.text, [self.captions[row] for row in rows])
        cut = [(row, place) for row, place in zip(rows, places, strict=True) if place is not None]
        return [{"row": row, "place": _in_utf16(self.captions[row][:place])} for row, place in cut]

    def _micro_batch(self, rows: Sequence[int], size: tuple[int, ...]) -> MicroBatch:
        return MicroBatch(0, size, tuple(self.drawn.samples[row] for row in rows), 0, {}, 0)

    def _readable(self, rows: Sequence[int], batch: Batch) -> Iterator[tuple[int, int]]:
        """(place in the batch, row) of those that were read; notes their captions, and why others were not."""
        self.unreadable |= {rows[event.place]: f"{event.source}: {event.reason}" for event in batch.events}
        bad, captions = {event.place for event in batch.events}, self.training.run.drawn_captions(batch)
        for place, row in enumerate(rows):
            if place not in bad:
                drawn = captions[place]
                self.captions[row] = clean(batch.captions[place] if drawn is None else drawn)
                if drawn is None:
                    self.dropped.add(row)
                yield place, row

    def _beside(self, batch: Batch) -> dict[str, Sequence[np.ndarray]]:
        """Masks, conditions and such: name -> of each sample uint8 (H, W, 3)."""
        found: dict[str, Sequence[np.ndarray]] = {}
        for name, one in self.training.needs.extra.items():
            if isinstance(one, PictureField):
                found[name] = [to_uint8(pixels.expand(3, -1, -1)) for pixels in batch.extra[name]]
        if batch.weight:
            found |= {name: to_pictures(made) for name, made in self.training.run.shown_beside(batch).items()}
        return found

    def _shown(self, batch: Batch, place: int, row: int, beside: dict[str, np.ndarray]) -> dict[str, Any]:
        whole: WholePicture = batch.extra[_WHOLE][place]
        pixels = to_uint8(batch.images[place])
        is_clip = pixels.ndim == 4
        sample = {
            "row": row,
            "crop": picture_uri(pixels[0] if is_clip else pixels, CROP_PX),
            "whole": picture_uri(whole.pixels, WHOLE_PX),
            "box": [round(share, 4) for share in whole.box],
            "dropped": row in self.dropped,
            "own": clean(batch.captions[place])[:MAX_TEXT],
            "beside": {clean(name): picture_uri(one, BESIDE_PX) for name, one in beside.items()},
        }
        if is_clip and len(pixels) > 1:
            sample |= {"clip": clip_uri(pixels, float(batch.columns["fps"][place])), "frames": len(pixels)}
        return sample


def _left_out(reader: Reader, recipe: Recipe, listed: Listed) -> Iterator[dict[str, Any]]:
    """Of every reason for which rows are not drawn, how many, and some of them with their pictures."""
    of_reason: dict[str, list[int]] = {}
    for row, state in enumerate(listed.state):
        if state != DRAWN:
            of_reason.setdefault(state, []).append(row)
    reader = _of_whole_pictures(reader)
    for reason, rows in sorted(of_reason.items(), key=lambda one: (one[0] == NOT_DRAWN, -len(one[1]))):
        examples = []
        for row in rows[:EXAMPLES]:
            shard = recipe.catalog.shard(listed.shard[row])
            place = row - listed.first[listed.shard[row]]
            (sample,) = make_samples(Selection().read(shard, place, place + 1), [shard], [0])
            examples.append({"row": row} | _example(reader, sample))
        yield {"reason": reason, "count": len(rows), "examples": examples}


def _of_whole_pictures(reader: Reader) -> Reader:
    """A reader of whole pictures alone."""
    extra = {_WHOLE: WholeField(reader.max_pixels, reader.background)}
    return replace(reader, captions=None, pictures=False, geometry=False, computed={}, columns={}, extra=extra)


def _example(reader: Reader, sample: Sample) -> dict[str, str]:
    if visual_member(member.lower() for member in sample.members) is None:
        return {"problem": f"it has no picture, but: {clean(', '.join(sorted(sample.members))) or 'nothing'}"}
    sample = replace(sample, width=max(1, sample.width), height=max(1, sample.height))  # 0 where nothing was measured
    batch = reader.__getitems__(MicroBatch(0, (1, 1), (sample,), 0, {}, 0))
    if batch.events:
        return {"problem": clean(batch.events[0].reason)}
    return {"whole": picture_uri(batch.extra[_WHOLE][0].pixels, WHOLE_PX)}
