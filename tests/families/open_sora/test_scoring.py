"""Minis of Open-Sora as they are scored: by the drawings that inference makes of a run, at its size and frame rate."""

import numpy as np
import pytest

from benchmarks.clip_seams import SEAM_PX, RunClips, distance, scenes
from benchmarks.learning import scored_by
from families.common.family import TEXT_TO_VIDEO
from families.registry import family_of, load_task
from tests.clips import write_clips
from tests.warpcore.runs import tiny_settings
from tools.demo_clips import render
from train.train_stdit import TrainStdit
from warpcore.config import make_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PROMPTS = ["a red circle", "a blue star moves"]
OF_RUN = {
    "model_version": "mini-1.1", "updates": 1, "save_every": 1, "sample_steps": 1, "sample_count": 1, "num_frames": 3,
    "frame_rate": 2, "image_size": 32, "text_encoder_precision": "float32",
}  # fmt: skip


def test_clips_of_a_run_of_1_1_are_scored_as_inference_draws_them(tmp_path):
    """Rebuilt are frames of the whole of a longer clip."""
    settings = tiny_settings(tmp_path, write_clips(tmp_path / "a.tar", 4), **OF_RUN)
    assert TrainStdit(make_config(TrainStdit.Config, settings)).run() == 0
    run, videos = tmp_path / "tiny", {}
    kind = scored_by(family_of(run))
    drawing = kind(make_config(kind.Config, {"run": [run]}), steps=2, guidance=4.0, sampler="ddim")
    (drawn,) = drawing.draw(PROMPTS, seed=3).values()
    given = [f"run={run}", "device=cpu", "steps=2", "guidance=4", "sampler=ddim", f"prompts={PROMPTS}"]
    task, config = load_task(TEXT_TO_VIDEO, given)
    task(config).draw([0, 1], [3, 4], lambda number, video: videos.update({number: video}))
    assert drawing.draws_clips
    for number, ours in enumerate(drawn):
        assert ours.shape == (3, 32, 32, 3)
        assert np.abs(ours.astype(int) - videos[number]).max() <= 1
    ((scene, _),) = scenes(1, ["right"], seed=8)
    true = render(scene)
    (rebuilt,) = drawing.rebuild([true], PROMPTS[:1])["autoencoder"]
    assert rebuilt.shape == (3, *true.shape[1:])
    assert all(distance(frame, own) < SEAM_PX for frame, own in zip(rebuilt, true[::11], strict=True))
    assert RunClips.of(str(run)) == RunClips(frames=3, latent_frames=3, step=4)
