"""Seams of true clips are within a pixel, and jumps, drifts of colour and empty frames are seen."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.clip_seams import SEAM_PX, RunClips, distance, drift, psnr, read_arguments, scenes
from tools.demo_clips import DIRECTIONS, TRAVEL, render
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


def test_true_clips_go_on_and_jumps_are_seen():
    for scene, _ in scenes(3, [*DIRECTIONS], seed=5):
        clip = render(scene)
        step = TRAVEL * scene.side / (len(clip) - 1)
        assert distance(clip[8], clip[9]) == pytest.approx(step, abs=1.0)
        assert distance(clip[8], clip[9]) < SEAM_PX < distance(clip[8], clip[16])
        assert distance(clip[8], np.full_like(clip[8], 128)) == float("inf")


def test_colours_drift_where_they_change():
    ((scene, _),) = scenes(1, ["stay"], seed=6)
    clip = render(scene)
    other = render(replace(scene, colour="blue" if scene.colour != "blue" else "red"))
    assert drift([clip[:8], clip[8:]]) < 3 < 20 < drift([clip, other])


def test_equal_frames_have_the_most_decibels():
    frames = render(scenes(1, ["stay"], seed=7)[0][0])[:2]
    noise = np.random.default_rng(0).normal(0, 10, frames.shape)
    assert psnr(frames, frames) > 100
    assert psnr(np.clip(frames + noise, 0, 255).astype(np.uint8), frames) == pytest.approx(28.5, abs=1)


def test_keys_may_stand_anywhere_and_something_is_left_to_draw():
    assert read_arguments(["a", "guidance=4", "40"]) == ("a", 40, 2, ["batch_size=10", "guidance=4"])
    assert read_arguments(["a"]) == ("a", 20, 2, ["batch_size=10"])
    clips = RunClips(frames=17, latent_frames=5, step=1)
    assert [clips.frames_of(given) for given in (1, 2, 4)] == [1, 5, 13]
    with pytest.raises(UserError, match="5 latent frames are given of 5: nothing is left to draw"):
        clips.frames_of(5)


def test_true_clips_are_as_those_of_the_run():
    """With fewer frames per second, and a latent one for each of them."""
    ((scene, _),) = scenes(1, [*DIRECTIONS], seed=8)
    clips = RunClips(frames=6, latent_frames=6, step=4)
    assert (clips.fps, clips.frames_of(2)) == (2, 2)
    assert np.array_equal(clips.true(scene, 2), render(scene)[2:23:4])
    assert np.array_equal(clips.true(scene, 20), render(scene)[3::4])  # 24 frames have no later one
