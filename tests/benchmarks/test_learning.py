"""The scorer of the benchmarks reads pictures as people do."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from benchmarks import classes, learning
from benchmarks.learning import LEAST_PSNR
from benchmarks.scorer import ATTRIBUTES, accuracy, distance, find, score, sentences
from families.cascade import build
from families.cascade.config import ModelSettings
from families.cascade.scoring import ScoredCascade
from tools.demo_scenes import (
    COLOURS,
    POSITIONS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    captioned_scene,
    describe,
    random_scene,
    render,
)
from train.train_c import TrainStageC
from train.train_c_controlnet import TrainControlNet
from train.train_c_lora import TrainLora
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """As small and soft as a preview: half the size, then blurred."""
    return cv2.GaussianBlur(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), (0, 0), 1.6)


@pytest.mark.parametrize(
    ("view", "least"), [(lambda picture: picture, 0.995), (shrunk, 0.98)], ids=["sharp", "preview"]
)
def test_the_scorer_recognises_true_pictures(view, least):
    rng = np.random.default_rng(11)
    results = []
    for _ in range(200):
        scene, text = captioned_scene(rng, ALL_PAIRS)
        results.append(score(view(render(scene)), describe(text)))
    for attribute in ("colour", "position", "shape", "count"):
        assert np.mean([result[attribute] for result in results]) >= least, attribute


def test_the_scorer_sees_what_is_wrong():
    rng = np.random.default_rng(12)
    for _ in range(60):
        scene, text = captioned_scene(rng)
        wanted = describe(text)
        other = {
            "colour": next(colour for colour in COLOURS if colour != scene.colour),
            "position": next(position for position in POSITIONS if position != scene.position),
            "shape": next(shape for shape in SHAPES if shape != scene.shape),
        }
        for attribute, value in other.items():
            result = score(render(replace(scene, count=1, **{attribute: value})), wanted | {"count": 1})
            assert not result.pop(attribute)
            assert all(result.values())


def test_one_colour_shape_pair_is_not_another():
    for colour, shape in sorted(UNSEEN_PAIRS):
        found = find(render(Scene(shape, colour, "centre", background="checker")))
        assert (found.colour, found.shape, found.position, found.count) == (colour, shape, "centre", 1)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_shows_nothing(value):
    result = score(
        np.full((64, 64, 3), value, np.uint8), {"colour": "red", "shape": "star", "position": "left", "count": 1}
    )
    assert result == dict.fromkeys(("colour", "shape", "position", "count"), False)


def test_noise_shows_no_shape_that_was_asked_for():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    both = [score(picture, {"shape": "star", "colour": "red", "position": "left"}) for picture in pictures]
    assert np.mean([all(result.values()) for result in both]) < 0.1


@pytest.fixture(scope="module")
def mini():
    return ModelSettings(model_version="mini")


@pytest.mark.slow
def test_the_shipped_cascade_keeps_what_the_scorer_looks_for():
    cases = sentences(60, ALL_PAIRS, seed=5)
    true, texts = [render(scene) for scene, _ in cases], [text for _, text in cases]
    settings = ScoredCascade.Config(model_version="mini", batch_size=30, device="cpu")
    for way, pictures in ScoredCascade(settings).rebuild(true, texts).items():
        shares = accuracy(pictures, texts)
        assert min(shares[name] for name in ATTRIBUTES) >= 0.9, (way, shares)
        if way == "Stage A":
            pairs = zip(pictures, true, strict=True)
            assert np.mean([distance(made, picture)[0] for made, picture in pairs]) >= LEAST_PSNR


@torch.inference_mode()
def test_the_shipped_text_tower_tells_the_attributes_apart(mini):
    """A linear map, fitted to sentences of the demo set, reads the attributes of sentences that it never has."""
    tower = build.text(mini).float()
    rng = np.random.default_rng(6)
    known = [captioned_scene(rng) for _ in range(1500)]
    new = sentences(300, SEEN_PAIRS, seed=7)

    def features(cases):
        pooled = tower.encode(*tower.tokenize([text for _, text in cases]))[1]
        return torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1)

    for attribute, values in {"colour": [*COLOURS], "shape": [*SHAPES], "position": [*POSITIONS]}.items():
        classes, wanted = (
            torch.tensor([values.index(getattr(scene, attribute)) for scene, _ in cases]) for cases in (known, new)
        )
        weights = torch.linalg.lstsq(features(known), torch.eye(len(values))[classes]).solution
        assert ((features(new) @ weights).argmax(dim=1) == wanted).float().mean() >= 0.85, attribute


@pytest.mark.integration
def test_a_run_is_scored_by_its_family(small_cascade, drawing_cascade, monkeypatch, capsys, tmp_path):
    TrainStageC(make_config(TrainStageC.Config, small_cascade)).run()
    run = f"{small_cascade['checkpoint_path']}/{small_cascade['experiment_id']}"
    arguments = ["--samples", "4", "--steps", "2", "--grid", str(tmp_path / "grid.png")]
    monkeypatch.setattr("sys.argv", ["learning.py", "--run", run, *arguments])
    learning.main()
    said = capsys.readouterr().out
    ways = ("Stage A", "encoder, previewer", "encoder, B, A", "drawn, pairs seen", "drawn, pairs never seen")
    assert all(way in said for way in ways)
    assert "targets (colour 90, position 90, shape 75 for pairs seen; Stage A 28 dB): missed in" in said
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    ("script", "keys", "expected"),
    [
        (TrainLora, {"module_filters": [".attn"], "rank": 2}, "LoRA, colour and place never shown"),
        (TrainControlNet, {"controlnet_blocks": [1, 4], "controlnet_filter": "CannyFilter"}, "with, guided"),
    ],
)
def test_what_steers_stage_c_is_scored(small_cascade, drawing_cascade, monkeypatch, capsys, script, keys, expected):
    known = {key: value for key, value in small_cascade.items() if key in script.Config.model_fields}
    script(make_config(script.Config, known | keys)).run()
    run = f"{small_cascade['checkpoint_path']}/{small_cascade['experiment_id']}"
    monkeypatch.setattr("sys.argv", ["learning.py", "--run", run, "--samples", "4", "--steps", "1"])
    learning.main()
    assert expected in capsys.readouterr().out


def test_a_family_without_scores_is_refused():
    with pytest.raises(UserError, match="the family Another has nothing to score its runs with"):
        learning.scored_by(SimpleNamespace(title="Another", task=lambda name: None))


def test_classes_are_scored_by_colour_and_shape():
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(40)]
    pictures, names = [render(scene) for scene in scenes], [f"{scene.colour} {scene.shape}" for scene in scenes]
    found = classes.shares(pictures, names)
    assert min(found.values()) > 0.9
    turned = names[1:] + names[:1]
    wrong = classes.shares(pictures, turned)
    assert wrong["class"] <= min(wrong["colour"], wrong["shape"]) < 0.5
