"""The contenders of `benchmarks/data.py --video` do the same work."""

import os

import numpy as np
import pytest

from benchmarks import video
from tests.warpcore.data.clips import SIZE, clip, encode, number_of, numbered
from warpcore.errors import UserError

FRAMES = [13, 15, 17, 30]


@pytest.mark.parametrize("kind", ["h264", "h264 open", "hevc"])
def test_the_limit_gives_the_same_pixels_from_as_few_packets(kind):
    expected = video.ours(clip(kind), FRAMES, SIZE)()
    assert [number_of(frame) for frame in expected] == FRAMES
    assert np.array_equal(video.limit(clip(kind), FRAMES, SIZE)(), expected)
    packets, times, _ = video.needed_packets(clip(kind), FRAMES)
    assert len(times) == len(FRAMES) <= len(packets) < 31


def test_pyav_with_seek_gives_the_same_frames():
    data = encode([numbered(number) for number in range(60)], rate=video.FPS, options={"g": "20", "bf": "2"})
    assert [number_of(frame) for frame in video.pyav(data, FRAMES, SIZE)()] == FRAMES


def test_a_film_moves_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "FOLDER", tmp_path)
    monkeypatch.setattr(video, "SIZES", {"480p": (64, 96)})
    data = video.video("h264", "480p", seconds=1)
    frames = video.ours(data, [0, 29], (64, 96))()
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 10
    (path,) = tmp_path.iterdir()
    path.write_bytes(clip("h264"))
    assert video.video("h264", "480p", seconds=1) == clip("h264")


def is_killed(*_):
    os._exit(9)


@pytest.mark.integration
def test_a_worker_that_is_killed_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(video, "video", lambda *_: b"")
    monkeypatch.setattr(video, "_read_again", is_killed)
    with pytest.raises(UserError, match=r"ended too early \(exit code 9\)"):
        video._memory("480p", 9, 3)
