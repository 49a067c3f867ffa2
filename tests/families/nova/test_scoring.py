"""Minis of NOVA as they are scored: by the drawings that inference makes of a run, at its size and with its groups."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning import scored_by
from benchmarks.scorer import distance, sentences
from families.common.family import CLASS_TO_IMAGE, TEXT_TO_IMAGE, TEXT_TO_VIDEO
from families.common.pictures import to_pictures
from families.registry import family_of, load_task
from tests.clips import write_clips
from tests.families.dit.classed import write_classed
from tests.warpcore.runs import tiny_settings, write_shard
from tools.demo_scenes import SEEN_PAIRS, render
from train.train_nova import TrainNova
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
PROMPTS = ["a red circle", "w2"]
OF_RUN = {"updates": 1, "save_every": 1, "sample_groups": 2, "sample_steps": 1, "sample_count": 1, "loss_repeat": 1,
          "text_encoder_precision": "float32"}  # fmt: skip


def run_of(home: Path, data: str, **keys) -> Path:
    assert TrainNova(make_config(TrainNova.Config, tiny_settings(home, data, **OF_RUN, **keys))).run() == 0
    return home / "tiny"


def scored(run: Path):
    kind = scored_by(family_of(run))
    return kind(make_config(kind.Config, {"run": [run]}), steps=2, guidance=4.0, sampler="ddim")


def task_of(name: str, run: Path):
    given = [f"run={run}", "device=cpu", "groups=2", "steps=2", "guidance=4", "seeds=[3]", f"prompts={PROMPTS}"]
    kind, config = load_task(name, given)
    return kind(config)


def test_pictures_of_a_run_are_scored_as_inference_draws_them(tmp_path):
    data = write_shard(tmp_path / "a.tar", 4, (64, 64))
    run = run_of(tmp_path, data, model_version="mini", num_frames=1, image_size=64)
    drawing = scored(run)
    (drawn,) = drawing.draw(PROMPTS, seed=3).values()
    expected = task_of(TEXT_TO_IMAGE, run).draw(PROMPTS, [3, 4]).pictures
    assert not drawing.draws_clips
    for ours, theirs in zip(drawn, expected, strict=True):
        assert ours.shape == (64, 64, 3)
        assert np.array_equal(ours, to_pictures(theirs[None])[0])
    true = render(sentences(1, SEEN_PAIRS, seed=0)[0][0])
    (rebuilt,) = drawing.rebuild([true], PROMPTS[:1])["autoencoder"]
    assert distance(rebuilt, true)[0] > 25


@pytest.mark.slow
def test_classes_of_a_run_are_scored_as_inference_draws_them(tmp_path):
    names = ["red circle", "blue star"]
    run = run_of(tmp_path, str(write_classed(tmp_path / "a.tar", [{"cls": b"1"}] * 4, 64)), model_version="mini",
                 num_frames=1, image_size=64, class_names=names, sample_classes=names[:1])  # fmt: skip
    drawing = scored(run)
    assert drawing.draws_classes
    (drawn,) = drawing.draw(names, seed=3).values()
    given = [f"run={run}", "device=cpu", "groups=2", "steps=2", "guidance=4", "seeds=[3]", f"classes={names}"]
    kind, config = load_task(CLASS_TO_IMAGE, given)
    expected = kind(config).draw([0, 1], [3, 4]).pictures
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.array_equal(ours, to_pictures(theirs[None])[0])
    with pytest.raises(UserError, match=r"it has no class 'red ring' .*, as quickstart_nova_classes\.yaml"):
        drawing.draw(["red ring"], seed=3)


@pytest.mark.slow
def test_clips_of_a_run_are_scored_as_inference_draws_them(tmp_path):
    run = run_of(tmp_path, write_clips(tmp_path / "a.tar", 4), model_version="mini-video", num_frames=5, image_size=32,
                 motion_column="flow", sample_flow=3.0, frame_rate=4, crop_mode="center")  # fmt: skip
    drawing, videos = scored(run), {}
    (drawn,) = drawing.draw(PROMPTS, seed=3).values()
    task_of(TEXT_TO_VIDEO, run).draw([0, 1], [3, 4], lambda number, video: videos.update({number: video}))
    assert drawing.draws_clips
    for number, ours in enumerate(drawn):
        assert ours.shape == (5, 32, 32, 3)
        assert np.abs(ours.astype(int) - videos[number]).max() <= 1
    still = render(sentences(1, SEEN_PAIRS, seed=0)[0][0])[::2, ::2]
    (rebuilt,) = drawing.rebuild([np.stack([still] * 7)], PROMPTS[:1])["autoencoder"]
    assert rebuilt.shape == (5, 64, 64, 3)
    assert distance(rebuilt[0], still)[0] > 15
