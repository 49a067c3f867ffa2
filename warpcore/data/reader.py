"""The work: the bytes of a micro-batch's samples, read, decoded and stacked into a batch. Runs in worker processes.

Import as little as possible here: every worker process pays for it at its start.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from warpcore.data import images, videos
from warpcore.data.captions import BadCaption, CaptionGetter
from warpcore.data.fields import BadMember, Field, collate, wanted
from warpcore.data.frames import choose_frames, frame_distance
from warpcore.data.geometry import CropGeometry, stored_geometry
from warpcore.data.images import BadPicture, Crop, Geometry
from warpcore.data.samples import PICTURE_FACTS, VIDEO_EXTENSIONS, MicroBatch, Sample, visual_member
from warpcore.data.shared_memory import new_bytes
from warpcore.data.storage import in_parallel, read_ranges
from warpcore.data.video_headers import MAX_FRAME_PIXELS
from warpcore.errors import UserError


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample whose content could not be decoded."""

    source: str
    """The tar, and in it the member: its key and extension."""
    reason: str
    place: int
    """Its position in the micro-batch, where now its replacement stands."""


@dataclass
class Batch:
    """A micro-batch that was read. Tensors are on the CPU, or on the device once `to` was called."""

    number: int
    """Global micro-batch number."""
    size: tuple[int, ...]
    """Bucket (H, W) in px; of clips (T, H, W)."""
    lane: int
    epoch: int
    state: dict
    """JSON-able state of the lane after this micro-batch."""
    images: Tensor | None
    """uint8 (B, 3, H, W), channels-last in memory; of clips (B, T, 3, H, W). None where the run reads no pictures."""
    captions: list[str]
    keys: list[str]
    seeds: list[int]
    """Of the sample that really stands there: a replacement brings its own."""
    weight: float
    """1.0; 0.0 when no sample of the micro-batch was readable: pictures are black and captions empty then."""
    events: list[BadSample] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    extra: dict[str, Tensor | list] = field(default_factory=dict)
    """Further members that a use case asked for, by name: (B, ...) where they stack, else a list of B. And what
    `Reader.computed` made."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """The index columns that the run asks for, by name: (B,) bool, int64 or float32. Of clips `fps` is float32 and as
    drawn: frames per second once the frames between are left out; 0 of a picture."""
    geometry: CropGeometry | None = None
    """True sizes and crops, where the use case asks for them (`needs_geometry`)."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """How long what was `timed` took per sample, by what it was and where."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`; to a GPU, the copy of pinned memory does not wait."""
        non_blocking = torch.device(device).type == "cuda"  # elsewhere it may read memory that is already given back
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    @contextmanager
    def timed(self, what: str, where: str, device: torch.device | None = None) -> Iterator[None]:
        """Put down how long the work inside takes, which waits for a `device` other than the CPU."""
        waits = device is not None and device.type != "cpu"
        if waits:
            torch.accelerator.synchronize(device)
        began = time.perf_counter()
        yield
        if waits:
            torch.accelerator.synchronize(device)
        self.milliseconds[f"{what} ({where})"] = (time.perf_counter() - began) * 1000 / len(self.seeds)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in it."""
        values = (self.images, *self.extra.values(), *self.columns.values(), self.geometry and self.geometry.values)
        yield from (value for value in values if isinstance(value, Tensor))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        extra = {name: function(value) if isinstance(value, Tensor) else value for name, value in self.extra.items()}
        pictures = None if self.images is None else function(self.images)
        columns = {name: function(value) for name, value in self.columns.items()}
        geometry = self.geometry and CropGeometry(function(self.geometry.values))
        return dataclasses.replace(self, images=pictures, extra=extra, columns=columns, geometry=geometry)


ReadRanges = Callable[[str, list[tuple[int, int]], tuple[int, str] | None], list[bytes]]


@dataclass(frozen=True)
class Reader:
    """The torch data set of a run: `reader.__getitems__(micro_batch)` is the batch. Picklable.

    A sample whose content cannot be decoded is replaced by the next readable one of its micro-batch, which brings its
    caption, key and seed along. An I/O fault is no property of a sample: it is raised.
    """

    captions: CaptionGetter | None = None
    """None: no captions are read; all are empty."""
    single_caption: bool = False
    """Several captions of a sample, of which its seed draws one, are an error."""
    pictures: bool = True
    """False: only captions and extra members are read, as with cached latents."""
    crop: Crop = "center"
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = images.MAX_PIXELS
    extra: Mapping[str, Field] = field(default_factory=dict)
    """Further members, by the name that they get in `Batch.extra`."""
    frame_stride: int = 1
    """Clips take one in `frame_stride` frames of a video, or"""
    frame_rate: float | None = None
    """as many as make this number of frames per second (see `warpcore.data.frames`)."""
    computed: Mapping[str, Callable[[Batch], Any]] = field(default_factory=dict)
    """Functions of the batch, on the CPU, whose results go to `Batch.extra` by these names too."""
    columns: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Index columns for `Batch.columns`, and what they become; samples bring their values."""
    geometry: bool = False
    """Whether `Batch.geometry` is wanted. Without pictures, what stands for them has to hold it, as in a cache."""
    geometry_remedy: str = ""
    """What a user does where it is not there: the end of an error message."""
    read_ranges: ReadRanges = read_ranges

    def __post_init__(self):
        if self.crop not in images.CROPS:
            raise UserError(f"crop_mode is {self.crop!r}; it is one of {', '.join(images.CROPS)}")

    def __getitems__(self, micro_batch: MicroBatch) -> Batch:
        """Raises what the storage raises where bytes can't be read."""
        size, samples = micro_batch.size, micro_batch.samples
        pixels = _new_pixels(len(samples), size) if self.pictures else None
        items: list[_Item | None] = []
        events = []
        for place, contents in enumerate(self._read(samples)):
            target = None if pixels is None else pixels[place].numpy()
            try:
                items.append(self._decode(samples[place], contents, size, target))
            except _BadContent as bad:
                items.append(None)
                source = f"{samples[place].tar_of(bad.suffix)[0]}/{samples[place].key}.{bad.suffix}"
                events.append(BadSample(source, bad.reason, place))
        weight = 1.0 if any(items) else 0.0
        items = self._without_gaps(items, micro_batch, pixels)
        batch = Batch(
            number=micro_batch.number,
            size=size,
            lane=micro_batch.lane,
            epoch=micro_batch.epoch,
            state=micro_batch.state,
            images=pixels if pixels is None or len(size) == 3 else pixels.permute(0, 3, 1, 2),
            captions=[item.caption for item in items],
            keys=[item.sample.key for item in items],
            seeds=[item.sample.seed for item in items],
            weight=weight,
            events=events,
            notes=micro_batch.notes,
            extra=collate(self.extra, [item.extra for item in items]),
            columns=self._columns([item.sample for item in items], size),
            geometry=CropGeometry.of([item.geometry for item in items]) if self.geometry else None,
        )
        for name, compute in self.computed.items():
            with batch.timed(name, "main process" if get_worker_info() is None else "workers"):
                batch.extra[name] = compute(batch)
        return batch

    def captions_of(self, samples: Sequence[Sample]) -> list[tuple[str, str]]:
        """(shard, caption) of those samples that have a usable caption; none where the run reads no captions."""
        if self.captions is None:
            return []
        found = []
        contents = replace(self, pictures=False, extra={}, geometry=False)._read(samples)
        for sample, members in zip(samples, contents, strict=True):
            with suppress(BadCaption):  # whoever trains on the sample reports it
                found.append((sample.shard, self.captions(members, sample.columns, sample.seed)))
        return found

    def _read(self, samples: Sequence[Sample]) -> list[dict[str, bytes]]:
        """For every sample the contents of its members that are asked for, by suffix; absent ones are left out."""
        contents: list[dict[str, bytes]] = [{} for _ in samples]
        wanted: dict[tuple[str, tuple[int, str] | None], list] = defaultdict(list)
        for place, sample in enumerate(samples):
            members = {suffix.lower(): span for suffix, span in sample.members.items()}
            for suffix in self._suffixes(sample, members):
                wanted[sample.tar_of(suffix)].append((*members[suffix], suffix, contents[place]))
        for members in wanted.values():
            members.sort(key=lambda member: member[0])  # neighbours together: storages join near ranges, disks too
        reads = [(shard, [member[:2] for member in members], version) for (shard, version), members in wanted.items()]
        for members, blocks in zip(wanted.values(), in_parallel(self.read_ranges, reads), strict=True):
            for (*_, suffix, of_sample), block in zip(members, blocks, strict=True):
                of_sample[suffix] = block
        return contents

    def _suffixes(self, sample: Sample, members: Mapping[str, Any]) -> set[str]:
        """The suffixes to read, of those that a sample has."""
        asked = [*self.captions.members] if self.captions else []
        asked += [suffix for one in self.extra.values() for suffix in _first(wanted(one, sample), members)]
        asked += [visual_member(members) or ""] if self.pictures else [PICTURE_FACTS] if self.geometry else []
        return {suffix for suffix in asked if suffix in members}

    def _decode(
        self, sample: Sample, contents: dict[str, bytes], size: tuple[int, ...], target: np.ndarray | None
    ) -> "_Item":
        """One sample; its pixels go into `target`, (H, W, 3) or (T, 3, H, W). Raises _BadContent."""
        caption = ""
        if self.captions:
            for member in self.captions.members:
                _content([member], contents, sample)
            try:
                seed = None if self.single_caption else sample.seed
                caption = self.captions(contents, sample.columns, seed)
            except BadCaption as error:
                raise _BadContent(next(iter(self.captions.members), "json"), str(error)) from error
        geometry = None
        if target is not None:
            suffix, content = _content([visual_member(contents) or "jpg"], contents, sample)
            try:
                geometry = self._decode_pixels(sample, content, size, target, suffix in VIDEO_EXTENSIONS)
            except BadPicture as error:
                raise _BadContent(suffix, str(error)) from error
        elif self.geometry:
            suffix, facts = _content([PICTURE_FACTS], contents, sample)
            try:
                geometry = stored_geometry(facts, sample, size[-2:], self.geometry_remedy)
            except BadPicture as error:
                raise _BadContent(suffix, str(error)) from error
        extra = {}
        for name, one in self.extra.items():
            suffix, content = _content(wanted(one, sample), contents, sample)
            try:
                extra[name] = one.decode(content, geometry, sample)
            except (BadPicture, BadMember) as error:
                raise _BadContent(suffix, str(error)) from error
        return _Item(sample, caption, extra, geometry)

    def _decode_pixels(
        self, sample: Sample, content: bytes, size: tuple[int, ...], target: np.ndarray, is_video: bool
    ) -> Geometry:
        if is_video:
            frames = choose_frames(
                sample.num_frames, sample.fps, size[0], stride=self.frame_stride, frame_rate=self.frame_rate,
                seed=sample.seed,
            )  # fmt: skip
            max_pixels = min(self.max_pixels, MAX_FRAME_PIXELS)
            return videos.decode(
                content, frames, size[-2:], self.crop, sample.seed, max_pixels=max_pixels, out=target
            ).geometry
        picture = images.decode(content, size[-2:], self.crop, sample.seed, self.background, self.max_pixels)
        if len(size) == 3:
            target = target[0].transpose(1, 2, 0)
        target[:] = picture.pixels
        return picture.geometry

    def _columns(self, samples: Sequence[Sample], size: tuple[int, ...]) -> dict[str, Tensor]:
        columns = {
            name: torch.tensor([sample.columns[name] for sample in samples], dtype=kind)
            for name, kind in self.columns.items()
        }
        if len(size) == 3:
            fps = np.array([sample.fps for sample in samples])
            drawn = fps / frame_distance(fps, self.frame_stride, self.frame_rate)
            columns["fps"] = torch.from_numpy(drawn.astype(np.float32))
        return columns

    def _without_gaps(
        self, items: list["_Item | None"], micro_batch: MicroBatch, pixels: Tensor | None
    ) -> list["_Item"]:
        """Put the next readable item, and its pixels, in the place of every unreadable one; blanks where none is."""
        readable = [place for place, item in enumerate(items) if item]
        if not readable:
            if pixels is not None:
                pixels.zero_()
            extra = {name: one.blank(micro_batch.size) for name, one in self.extra.items()}
            size = micro_batch.size
            return [
                _Item(sample, "", extra, images.place((sample.height, sample.width), size[-2:]))
                for sample in micro_batch.samples
            ]
        filled = []
        for place, item in enumerate(items):
            origin = next((other for other in readable if other >= place), readable[0])
            if item is None and pixels is not None:
                pixels[place] = pixels[origin]
            filled.append(items[origin])
        return filled


class _Item(NamedTuple):
    sample: Sample
    caption: str
    extra: dict[str, Any]
    geometry: Geometry | None


class _BadContent(Exception):
    def __init__(self, suffix: str, reason: str):
        super().__init__(suffix, reason)
        self.suffix, self.reason = suffix, reason


def _first(suffixes: Sequence[str], members: Mapping[str, Any]) -> list[str]:
    """The first of the suffixes that a sample has, if any."""
    return [suffix for suffix in suffixes if suffix in members][:1]


def _content(suffixes: Sequence[str], contents: Mapping[str, bytes], sample: Sample) -> tuple[str, bytes]:
    for suffix in _first(suffixes, contents):
        return suffix, contents[suffix]
    raise _BadContent(suffixes[0], f"the sample has no .{suffixes[0]}; it has: {', '.join(sorted(sample.members))}")


def _new_pixels(number: int, size: tuple[int, ...]) -> Tensor:
    """uint8 (B, H, W, 3), or (B, T, 3, H, W) of clips."""
    shape = (number, *size, 3) if len(size) == 2 else (number, size[0], 3, *size[1:])
    return new_bytes(prod(shape)).view(shape)
