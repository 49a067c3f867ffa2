"""The demo world: deterministic, held apart, and described truthfully."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from modules.tokenizers import split_words
from tools.demo_scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    caption,
    captioned_scene,
    describe,
    is_held_out,
    render,
    shape_mask,
)
from tools.make_demo_dataset import main, make_demo_dataset
from tools.make_demo_subject import make_demo_subject
from warpcore.errors import UserError

ROOT = Path(__file__).parents[2]
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def scenes(number: int, **options) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(3)
    return [captioned_scene(rng, **options) for _ in range(number)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[0-9]*.*")}


def test_a_caption_says_what_the_scene_shows():
    for scene, text in scenes(500):
        said = describe(text)
        assert {"shape", "colour", "position", "count"} <= said.keys(), text
        assert all(getattr(scene, attribute) == value for attribute, value in said.items()), text


def test_captions_fit_the_text_towers_context():
    assert max(len(text.replace(",", " ,").replace(":", " :").split()) for _, text in scenes(2000)) <= 22


def test_wordings_vary():
    scene = Scene("circle", "purple", "left")
    rng = np.random.default_rng(0)
    assert len({caption(scene, rng) for _ in range(200)}) > 100


def test_held_out_pairs_and_sentences_never_meet_the_demo_set():
    training = scenes(2000)
    assert not {(scene.colour, scene.shape) for scene, _ in training} & UNSEEN_PAIRS
    assert {(scene.colour, scene.shape) for scene, _ in training} == set(SEEN_PAIRS)
    assert not {text for _, text in training} & {text for _, text in scenes(2000, held_out=True)}
    assert all(is_held_out(text) for _, text in scenes(50, held_out=True))


def test_every_value_of_every_attribute_occurs():
    shown = [scene for scene, _ in scenes(500)]
    assert {scene.shape for scene in shown} == set(SHAPES)
    assert {scene.colour for scene in shown} == set(COLOURS)
    assert {scene.position for scene in shown} == set(POSITIONS)
    assert {scene.background for scene in shown} == set(BACKGROUNDS)
    assert {scene.count for scene in shown} == {1, 2, 3}
    assert len({(scene.width, scene.height) for scene in shown}) == 3


def test_a_scene_always_looks_the_same_and_its_seed_matters():
    scene, _ = scenes(1)[0]
    np.testing.assert_array_equal(render(scene), render(scene))
    assert (render(scene) != render(replace(scene, seed=scene.seed + 1))).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_anti_aliased_and_inside_their_radius(shape):
    mask = shape_mask(shape, 64, 64, 31.5, 32.25, 20)
    rows, columns = np.nonzero(mask)
    assert np.hypot(rows + 0.5 - 32.25, columns + 0.5 - 31.5).max() < 1.4 * 20
    assert 0.02 < ((mask > 0.02) & (mask < 0.98)).sum() / (mask > 0).sum() < 0.5
    # The same shape at four times the size covers sixteen times the area: nothing is cut off or filled in.
    assert shape_mask(shape, 256, 256, 126, 129, 80).sum() == pytest.approx(16 * mask.sum(), rel=0.04)


def test_nothing_is_cut_off_at_the_edge():
    for scene, _ in scenes(300):
        picture = cv2.cvtColor(render(replace(scene, background="plain")), cv2.COLOR_RGB2LAB).astype(int)
        chroma = np.hypot(picture[..., 1] - 128, picture[..., 2] - 128)
        border = np.concatenate([chroma[0], chroma[-1], chroma[:, 0], chroma[:, -1]])
        assert border.max() < 20, scene


def test_a_sentence_without_a_shape_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"names no shape.*circle, square"):
        describe("a red elephant on the left")


def test_the_demo_set_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        make_demo_dataset(tmp_path / name, 30, seed=4)
    make_demo_dataset(tmp_path / "c", 30, seed=5)
    first = files_of(tmp_path / "a")
    assert len(first) == 90
    assert first == files_of(tmp_path / "b")
    assert first != files_of(tmp_path / "c")


def test_the_json_beside_a_picture_is_true_and_scores_spoiled_pictures_low(tmp_path):
    make_demo_dataset(tmp_path, 150)
    scores = []
    for path in sorted(tmp_path.rglob("*.json")):
        described = json.loads(path.read_text())
        picture = cv2.imread(str(path.with_suffix(".jpg")))
        assert picture.shape == (described["height"], described["width"], 3)
        assert path.with_suffix(".txt").read_text().strip() == described["caption"]
        assert describe(described["caption"])["colour"] == described["colour"]
        scores.append(described["aesthetic_score"])
    assert 0.01 < np.mean(np.array(scores) < 4.5) < 0.15


def test_the_held_out_set_shows_unseen_pairs_and_only_held_out_sentences(tmp_path):
    main([str(tmp_path), "--num_pictures", "120", "--held_out"])
    described = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert all(is_held_out(item["caption"]) for item in described)
    assert {(item["colour"], item["shape"]) for item in described} & UNSEEN_PAIRS


def test_a_folder_with_more_pictures_is_refused(tmp_path):
    make_demo_dataset(tmp_path, 3)
    with pytest.raises(UserError, match="holds 3 pictures already"):
        main([str(tmp_path), "--num_pictures", "2"])


def test_a_folder_of_other_things_is_left_as_it_is(tmp_path):
    (tmp_path / "000").mkdir()
    (tmp_path / "000/000000.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty and no demo data set"):
        main([str(tmp_path), "--num_pictures", "2"])
    assert (tmp_path / "000/000000.jpg").read_bytes() == b"mine"
    make_demo_dataset(tmp_path / "new", 2)
    make_demo_dataset(tmp_path / "new", 2)


def test_pictures_of_the_subject_replace_only_earlier_ones(tmp_path):
    (tmp_path / "00.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty and no demo data set"):
        make_demo_subject(tmp_path)
    assert (tmp_path / "00.jpg").read_bytes() == b"mine"
    make_demo_subject(tmp_path / "new")
    make_demo_subject(tmp_path / "new")


def test_the_shipped_vocabulary_knows_every_word_of_the_captions():
    config = yaml.safe_load((ROOT / "configs/training/mini_towers.yaml").read_text())
    used = {word for _, text in scenes(3000, pairs=ALL_PAIRS) for word in split_words(text)}
    assert used == set(config["words"])


def test_the_quickstarts_prompts_are_held_out():
    lines = (ROOT / "configs/inference/quickstart_prompts.txt").read_text().splitlines()
    prompts = [line for line in lines if not line.startswith("#")]
    asked = [describe(prompt) for prompt in prompts]
    pairs = [(said["colour"], said["shape"]) for said in asked]
    assert all(is_held_out(prompt) for prompt in prompts)
    assert all({"position", "count"} <= said.keys() for said in asked)
    assert len(pairs) == 24
    assert set(pairs[:18]) <= set(SEEN_PAIRS)
    assert set(pairs[18:]) == UNSEEN_PAIRS
