"""The mini Stable Diffusion as it is scored: its shipped autoencoder, and drawings out of a run."""

import numpy as np
import pytest

from benchmarks.learning import scored_by
from benchmarks.scorer import accuracy, distance, sentences
from families.common.pictures import to_pictures
from families.registry import family_of
from families.stable_diffusion.scoring import ScoredStableDiffusion
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from tests.warpcore.runs import tiny_settings, write_shard
from tools.demo_scenes import SEEN_PAIRS, render
from train.train_sd import TrainSd
from warpcore.config import make_config

pytestmark = pytest.mark.integration


def test_the_shipped_autoencoder_keeps_colours_places_and_shapes():
    drawing = ScoredStableDiffusion(
        make_config(ScoredStableDiffusion.Config, {"model_version": "mini"}), steps=1, guidance=1, sampler="ddim"
    )
    scenes = sentences(60, SEEN_PAIRS, seed=0)
    true, texts = [render(scene) for scene, _ in scenes], [text for _, text in scenes]
    (rebuilt,) = drawing.rebuild(true, texts).values()
    shares = accuracy(rebuilt, texts)
    assert shares["colour"] >= 0.98
    assert shares["position"] >= 0.98
    assert shares["shape"] >= 0.9
    assert np.mean([distance(made, picture)[0] for made, picture in zip(rebuilt, true, strict=True)]) > 27


def test_a_run_is_scored_by_the_drawings_that_inference_makes_of_it(tmp_path):
    data = write_shard(tmp_path / "a.tar", 4, (64, 64))
    settings = tiny_settings(tmp_path, data, updates=1, image_size=64, model_version="mini", diffusion_target="v",
                             zero_terminal_snr=True, sample_steps=1, sample_count=1)  # fmt: skip
    assert TrainSd(make_config(TrainSd.Config, settings)).run() == 0
    run, sampling = tmp_path / "tiny", {"steps": 2, "guidance": 4.0, "sampler": "ddim"}
    kind, prompts = scored_by(family_of(run)), ["a red circle", "two blue stars"]
    (drawn,) = kind(make_config(kind.Config, {"run": [run]}), **sampling).draw(prompts, seed=3).values()

    given = {"run": [run], "prompts": prompts, "image_size": 128, "guidance_rescale": 0.0} | sampling
    expected = StableDiffusionTextToImage(make_config(StableDiffusionTextToImage.Config, given)).draw(prompts, [3, 4])
    for ours, theirs in zip(drawn, expected.pictures, strict=True):
        assert ours.shape == (128, 128, 3)
        assert np.array_equal(ours, to_pictures(theirs[None])[0])
