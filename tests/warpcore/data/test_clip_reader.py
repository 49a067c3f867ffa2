"""Micro-batches of clips: which frames they hold, pictures among them, what replaces a bad one, and read-ahead."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.warpcore.data.clips import SIZE, clip, number_of
from tests.warpcore.data.test_reader import TXT, picture, write_shard
from warpcore.data import images, loader
from warpcore.data.frames import choose_frames
from warpcore.data.loader import Loader
from warpcore.data.reader import Batch, Reader
from warpcore.data.samples import MicroBatch, Sample
from warpcore.data.videos import decode

KINDS = ("h264", "hevc", "vp9", "h264 ts")
EXTENSIONS = {"h264": "mp4", "hevc": "mov", "vp9": "webm", "h264 ts": "ts"}


def clip_samples(path, contents: list[tuple[str, bytes]]) -> list[Sample]:
    """Samples of files by extension; those of videos are said to have 60 frames at 24 per second."""
    members = [{extension: data, "txt": f"number {n}".encode()} for n, (extension, data) in enumerate(contents)]
    video = {"width": SIZE[1], "height": SIZE[0], "num_frames": 60, "fps": 24.0}
    return [sample if "png" in sample.members else replace(sample, **video) for sample in write_shard(path, members)]


def clips_of(kinds: tuple[str, ...] = KINDS) -> list[tuple[str, bytes]]:
    return [(EXTENSIONS[kind], clip(kind)) for kind in kinds]


def read(samples: list[Sample], size: tuple[int, ...], **settings) -> Batch:
    return Reader(captions=TXT, **settings).__getitems__(MicroBatch(0, size, tuple(samples), 0, {}, 0))


def numbers(batch: Batch) -> list[list[int]]:
    """The numbers that the frames of each clip show."""
    return [[number_of(frame.permute(1, 2, 0).numpy()) for frame in one] for one in batch.images]


@pytest.mark.parametrize(
    ("settings", "drawn_fps"),
    [({}, 24.0), ({"frame_stride": 3}, 8.0), ({"frame_rate": 10.0}, 10.0), ({"frame_rate": 50.0}, 24.0)],
)
def test_clips_hold_the_frames_that_their_seeds_choose(tmp_path, settings, drawn_fps):
    samples = clip_samples(tmp_path / "a.tar", clips_of())
    batch = read(samples, (9, *SIZE), **settings)
    assert batch.images.shape == (4, 9, 3, *SIZE)
    assert batch.images.dtype == torch.uint8
    keys = {"stride": settings.get("frame_stride", 1), "frame_rate": settings.get("frame_rate")}
    assert numbers(batch) == [choose_frames(60, 24.0, 9, seed=sample.seed, **keys) for sample in samples]
    assert len({of_clip[0] for of_clip in numbers(batch)}) > 1
    assert batch.columns["fps"].dtype == torch.float32
    assert batch.columns["fps"].tolist() == pytest.approx([drawn_fps] * 4)
    assert batch.captions == [f"number {n}" for n in range(4)]


@pytest.mark.parametrize("crop", ["center", "random", "smart"])
def test_pixels_and_crop_of_a_clip_are_those_of_its_seed(tmp_path, crop):
    samples = clip_samples(tmp_path / "a.tar", clips_of())
    batch = read(samples, (5, 64, 64), crop=crop, geometry=True)
    for place, (sample, (_, data)) in enumerate(zip(samples, clips_of(), strict=True)):
        frames = choose_frames(60, 24.0, 5, seed=sample.seed)
        pixels, geometry = decode(data, frames, (64, 64), crop, sample.seed)
        assert np.array_equal(batch.images[place].permute(0, 2, 3, 1).numpy(), pixels)
        assert batch.geometry.crop[place].tolist() == [geometry.top, geometry.left]
        assert batch.geometry.source[place].tolist() == list(SIZE)


def test_pictures_are_clips_of_one_frame(tmp_path):
    data = picture(90)
    batch = read(clip_samples(tmp_path / "a.tar", [("png", data), *clips_of(("h264",))]), (1, 48, 64))
    assert batch.images.shape == (2, 1, 3, 48, 64)
    expected = images.decode(data, (48, 64)).pixels
    assert np.array_equal(batch.images[0, 0].permute(1, 2, 0).numpy(), expected)
    assert batch.columns["fps"].tolist() == [0.0, 24.0]


BAD = {
    "cut off": (clip("h264 mkv")[:6000], "it has 2. frames; number"),
    "no video": (b"<html>", "it is no MP4"),
    "empty": (b"", "empty file"),
    "fewer frames than the index says": (clip("h264", num_frames=20), "it has 20 frames; number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_clip_is_named_and_replaced_by_the_next_one(tmp_path, kind):
    data, reason = BAD[kind]
    first, third = clips_of(("h264", "vp9"))
    samples = clip_samples(tmp_path / "a.tar", [first, ("mkv", data), third])
    batch = read(samples, (32, *SIZE))
    (event,) = batch.events
    assert event.source.endswith("a.tar/a1.mkv")
    assert event.place == 1
    assert re.search(reason, event.reason)
    assert batch.keys == ["a0", "a2", "a2"]
    assert torch.equal(batch.images[1], batch.images[2])
    assert batch.weight == 1.0


def test_where_no_clip_can_be_read_the_batch_is_black_and_weighs_nothing(tmp_path):
    batch = read(clip_samples(tmp_path / "a.tar", [("mp4", b"x"), ("mp4", b"y")]), (4, *SIZE), geometry=True)
    assert (batch.weight, len(batch.events)) == (0.0, 2)
    assert not batch.images.any()
    assert batch.images.shape == (2, 4, 3, *SIZE)


@pytest.mark.integration
def test_workers_read_clips_as_the_main_process_does(tmp_path):
    samples = clip_samples(tmp_path / "a.tar", [*clips_of(), ("mp4", b"bad"), ("png", picture(5))])
    micro_batches = [
        MicroBatch(0, (9, *SIZE), tuple(samples[:3]), 0, {}, 0),
        MicroBatch(1, (1, 32, 32), (samples[5],), 0, {}, 0),
        MicroBatch(2, (17, *SIZE), tuple(samples[3:5]), 0, {}, 0),
    ]
    expected = list(Loader(micro_batches, Reader(captions=TXT), num_workers=0))
    with Loader(micro_batches, Reader(captions=TXT), num_workers=2) as batches:
        found = list(batches)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.size, one.keys, one.events) == (other.size, other.keys, other.events)
        assert torch.equal(one.columns["fps"], other.columns["fps"])


@pytest.mark.parametrize(("batch_bytes", "ahead"), [(0, 2), (2**20, 2), (2**30, 2), (2**30 + 1, 1), (2**34, 1)])
def test_fewer_micro_batches_are_read_ahead_where_they_are_large(monkeypatch, batch_bytes, ahead):
    made = []
    monkeypatch.setattr(loader, "_Workers", lambda reader, num_workers, prefetch: made.append((num_workers, prefetch)))
    Loader([], Reader(), num_workers=2, batch_bytes=batch_bytes)
    assert made == [(2, ahead)]
