import json
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest

from warpcore.data.frames import choose_frames, frame_distance, frames_needed

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/opensora/frame_indices.json").read_text(encoding="utf-8")
)  # fmt: skip


def from_first(first: int, num_frames: int, wanted: int, **keys) -> list[int]:
    """What is chosen by the first seed that begins with the frame `first`."""
    drawn = (choose_frames(num_frames, 24.0, wanted, seed=seed, **keys) for seed in count())
    return next(frames for frames in drawn if frames[0] == first)


@pytest.mark.parametrize("case", [one for one in GOLDEN if one["frame_interval"] == 1 and "result" in one])
def test_without_a_stride_the_frames_are_those_of_open_sora(case):
    assert from_first(case["result"][0], case["total"], case["num_frames"]) == case["result"]


@pytest.mark.parametrize("case", [one for one in GOLDEN if one["frame_interval"] > 1 and one["total"] >= 48])
def test_with_a_stride_they_are_the_same_but_that_all_gaps_are_equal(case):
    stride, golden = case["frame_interval"], case["result"]
    frames = from_first(golden[0], case["total"], case["num_frames"], stride=stride)
    assert {after - before for before, after in pairwise(frames)} == {stride}
    later = np.array(golden) - frames
    assert later.min() == 0
    assert later.max() < stride


@pytest.mark.parametrize("keys", [{}, {"stride": 3}, {"frame_rate": 10.0}])
def test_every_beginning_that_leaves_room_is_drawn_equally_often(keys):
    needed = frames_needed(5, 24.0, **keys)
    firsts = [choose_frames(int(needed) + 9, 24.0, 5, seed=seed, **keys)[0] for seed in range(4000)]
    counts = np.bincount(firsts)
    assert len(counts) == 10
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize("fps", [24.0, 23.976, 29.97, 30.0, 50.0, 60.0])
@pytest.mark.parametrize("frame_rate", [8.0, 10.0, 12.0, 23.976])
def test_a_frame_rate_takes_the_frames_nearest_in_time(fps, frame_rate):
    frames = np.array(choose_frames(400, fps, 17, frame_rate=frame_rate, seed=1))
    seconds = (frames - frames[0]) / fps
    assert np.abs(seconds - np.arange(17) / frame_rate).max() <= 0.5 / fps + 1e-9
    assert (np.diff(frames) > 0).all()


def test_a_video_slower_than_the_frame_rate_keeps_all_its_frames():
    assert np.diff(choose_frames(40, 8.0, 17, frame_rate=24.0, seed=1)).tolist() == [1] * 16
    assert frame_distance(8.0, frame_rate=24.0) == 1


def test_frames_needed_is_what_a_clip_spans_also_for_many_videos_at_once():
    fps = np.array([8.0, 23.976, 30.0, 0.0])
    for keys in ({}, {"stride": 4}, {"frame_rate": 12.0}):
        needed = frames_needed(9, fps, **keys)
        assert needed.dtype == np.int64
        for rate, span in zip(fps.tolist(), needed.tolist(), strict=True):
            frames = choose_frames(span, rate, 9, seed=3, **keys)
            assert frames[0] == 0
            assert frames[-1] == span - 1
    assert frames_needed(np.array([1, 17, 33]), 30.0, 2).tolist() == [1, 33, 65]


def test_a_video_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="17 frames span 33 of the video's, which has 32"):
        choose_frames(32, 24.0, 17, stride=2, seed=0)


def test_seeds_decide():
    drawn = [choose_frames(1000, 24.0, 5, seed=seed)[0] for seed in range(50)]
    assert drawn == [choose_frames(1000, 24.0, 5, seed=seed)[0] for seed in range(50)]
    assert len(set(drawn)) > 40
