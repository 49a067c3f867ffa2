"""Clips in situations of public reports about other trainers: how many frames a video has, and data sets of a few."""

import re
from fractions import Fraction

import pytest
import yaml

from tests.warpcore.data.tars import catalog_of, picture, write_tar
from tests.warpcore.data.videos import video
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.clip_buckets import ClipBuckets, rungs_of
from warpcore.data.columns import column_types
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.errors import UserError

SIZE = (32, 32)


def plan_of(folder, videos: dict[str, bytes], frames: dict[int, int], **rates) -> Plan:
    """A plan for videos by name, and buckets of 32 px by frames, each with its micro-batch size."""
    write_tar(folder / "a.tar", list(videos.items()))
    rungs = rungs_of({"32px": {length: (1.0, size) for length, size in frames.items()}}, 8)
    buckets = ClipBuckets(rungs, rates.get("stride", 1), rates.get("frame_rate"))
    return Plan(catalog_of(folder / "a.tar"), micro_batch_size=None, buckets=buckets)


@pytest.mark.parametrize(
    ("frames", "fps", "frame_rate", "most"),
    [
        (49, 24, 24, 49),  # tdrussell/diffusion-pipe#39: 49 frames counted as 41
        (49, 16, 16, 49),  # tdrussell/diffusion-pipe#513: as 48
        (64, 16, 16, 64),  # tdrussell/diffusion-pipe#258: as fewer than 64
        (89, 16, 16, 89),  # tdrussell/diffusion-pipe#349: as fewer than 89
        (101, Fraction(24000, 1001), 16, 68),  # tdrussell/diffusion-pipe#391: as 67
        (113, Fraction(24000, 1001), 16, 76),
        (34, 30, 24, 27),
    ],
)
def test_a_video_fills_the_longest_bucket_that_its_frames_do_and_decodes(tmp_path, frames, fps, frame_rate, most):
    content = {"a_1.mp4": video(frames, SIZE, fps=fps)}
    plan = plan_of(tmp_path, content, {most: 1}, frame_rate=frame_rate)
    batch = Reader(frame_rate=frame_rate).__getitems__(next(plan.micro_batches()))
    assert (batch.events, batch.weight, batch.images.shape[1]) == ([], 1.0, most)
    with pytest.raises(UserError, match=rf"too few frames for the shortest bucket .*frame_rate {frame_rate}"):
        _ = next(plan_of(tmp_path, content, {most + 1: 1}, frame_rate=frame_rate).micro_batches())


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_clips_than_a_micro_batch_are_trained_on(tmp_path, count):
    """hpcaitech/Open-Sora#710 and #562: epochs of no update, in silence; tdrussell/diffusion-pipe#130: left out."""
    contents = {f"{n}.mp4": video(9, SIZE) for n in range(count)}
    plan = plan_of(tmp_path, contents, {5: 4})
    micro_batches = [one for one, _ in zip(plan.micro_batches(), range(3), strict=False)]
    drawn = [sample.key for one in micro_batches for sample in one.samples]
    assert len(drawn) == 12
    assert {drawn.count(str(n)) for n in range(count)} == {12 // count}


def test_names_with_underscores_and_numbers_stay_apart(tmp_path):
    """kohya-ss/musubi-tuner#3: of names such as `a_1` a cache took parts for numbers of frames."""
    names = ["a", "a_1", "a_1_00005-004", "a_1_0032x0032", "a_00005"]
    plan = plan_of(tmp_path, {f"{name}.mp4": video(9, SIZE) for name in names}, {5: 5})
    assert sorted(sample.key for sample in next(plan.micro_batches()).samples) == sorted(names)


def test_samples_without_captions_are_refused_with_what_to_write_and_then_all_drawn(tmp_path):
    """kohya-ss/musubi-tuner#875: a cache of pictures that had no captions was empty, and called a success."""
    catalog = catalog_of(write_tar(tmp_path / "a.tar", [(f"{n}.png", picture(kind="PNG")) for n in range(3)]))
    settings = {"micro_batch_size": 3, "buckets": Buckets.for_image_size(16, factor=8)}
    with pytest.raises(UserError, match=r"no sample has a \.txt.* to train without captions") as refused:
        Plan(catalog, captions=CaptionGetter.parse(["txt", "identity"]), **settings)
    told = re.search(r"write captions_getter: (.*) to train", str(refused.value))[1]
    captions = CaptionGetter.parse(yaml.safe_load(told))
    columns = column_types(catalog, captions.columns)
    micro_batch = next(Plan(catalog, captions=captions, columns=columns, **settings).micro_batches())
    assert Reader(captions=captions).__getitems__(micro_batch).captions == ["", "", ""]
