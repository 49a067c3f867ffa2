"""The moving demo world: deterministic, held apart, and described truthfully."""

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tools.demo_clips import MOTIONS, ROUND, MovingScene, captioned_scene, describe, lanes, render
from tools.demo_scenes import BACKGROUNDS, COLOURS, POSITIONS, SEEN_PAIRS, SHAPES, UNSEEN_PAIRS, is_held_out
from tools.make_demo_dataset import main, make_demo_dataset
from warpcore.errors import UserError


def scenes(number: int, **options) -> list[tuple[MovingScene, str]]:
    rng = np.random.default_rng(3)
    return [captioned_scene(rng, **options) for _ in range(number)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[0-9]*.*")}


def test_a_caption_says_what_the_clip_shows():
    for scene, text in scenes(1000):
        said = describe(text)
        assert said == {name: getattr(scene, name) for name in ("motion", "shape", "colour", "position")}, text


def test_a_sentence_without_a_motion_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"names no motion.*moves to the left.*grows"):
        describe("a red circle at the top")


def test_every_value_of_every_attribute_occurs_and_held_out_ones_never_meet_the_demo_set():
    training = scenes(2000)
    shown = [scene for scene, _ in training]
    assert {scene.motion for scene in shown} == set(MOTIONS)
    assert {scene.shape for scene in shown} == set(SHAPES)
    assert {scene.colour for scene in shown} == set(COLOURS)
    assert {scene.position for scene in shown} == set(POSITIONS)
    assert {scene.background for scene in shown} == set(BACKGROUNDS)
    assert {(scene.colour, scene.shape) for scene in shown} == set(SEEN_PAIRS)
    assert not any(scene.shape in ROUND for scene in shown if scene.motion == "turn")
    assert all(scene.position in lanes(scene.motion) for scene in shown)
    assert not any(is_held_out(text) for _, text in training)
    assert all(is_held_out(text) for _, text in scenes(50, held_out=True))


def test_a_scene_always_looks_the_same_and_its_seed_matters():
    scene, _ = scenes(1)[0]
    assert render(scene).shape == (24, 64, 64, 3)
    np.testing.assert_array_equal(render(scene), render(scene))
    assert (render(scene) != render(replace(scene, seed=scene.seed + 1))).any()


def test_things_move_as_told_over_a_still_background_and_stay_whole():
    for scene, _ in scenes(40):
        clip = render(replace(scene, background="plain")).astype(int)
        thing = (clip.max(axis=-1) - clip.min(axis=-1)) > 60  # backgrounds are greyish
        assert not thing[:, [0, -1]].any()
        assert not thing[:, :, [0, -1]].any()
        middles = np.array([np.argwhere(mask).mean(axis=0)[::-1] for mask in thing])
        x, y = (middles[-1] - middles[0]) / 64
        area = thing[-1].sum() / thing[0].sum()
        led = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(scene.motion, (0, 0))
        assert (round(2 * x), round(2 * y)) == led, scene
        assert (area > 2.5) == (scene.motion == "grow"), scene
        assert (clip[0] == clip[-1]).all() == (scene.motion == "stay"), scene


def test_the_demo_set_is_the_same_every_time_and_its_files_say_what_they_show(tmp_path):
    make_demo_dataset(tmp_path / "a", 12, seed=4, video=True)
    main([str(tmp_path / "b"), "--video", "--num_videos", "12", "--seed", "4"])
    make_demo_dataset(tmp_path / "c", 12, seed=5, video=True)
    first = files_of(tmp_path / "a")
    assert len(first) == 4 * 12
    assert first == files_of(tmp_path / "b")
    assert first != files_of(tmp_path / "c")
    for path in (tmp_path / "a").rglob("*.json"):
        described = json.loads(path.read_text())
        assert path.with_suffix(".txt").read_text().strip() == described["caption"]
        assert describe(described["caption"])["motion"] == described["motion"]
        assert MOTIONS[int(path.with_suffix(".cls").read_text())] == described["motion"]
        with av.open(io.BytesIO(path.with_suffix(".mp4").read_bytes())) as container:
            stream = container.streams.video[0]
            assert (stream.frames, float(stream.average_rate), stream.width, stream.height) == (24, 8, 64, 64)


def test_the_held_out_set_shows_unseen_pairs_and_only_held_out_sentences(tmp_path):
    main([str(tmp_path), "--video", "--num_videos", "30", "--held_out"])
    described = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert all(is_held_out(item["caption"]) for item in described)
    assert {(item["colour"], item["shape"]) for item in described} & UNSEEN_PAIRS


def test_pictures_and_clips_never_mix_in_a_folder(tmp_path):
    main([str(tmp_path / "clips"), "--video", "--num_videos", "3"])
    main([str(tmp_path / "pictures"), "--num_pictures", "3"])
    with pytest.raises(UserError, match="holds 3 clips already, more than 0"):
        main([str(tmp_path / "clips"), "--num_pictures", "3"])
    with pytest.raises(UserError, match="holds 3 pictures already, more than 0"):
        main([str(tmp_path / "pictures"), "--video"])
    with pytest.raises(UserError, match="holds 3 clips already, more than 2"):
        main([str(tmp_path / "clips"), "--video", "--num_videos", "2"])


@pytest.mark.parametrize(
    ("words", "error"),
    [(["--num_videos", "3"], "--num_videos needs --video"), (["--video", "--num_pictures", "3"], "give --num_videos")],
)
def test_numbers_of_the_other_kind_are_refused(tmp_path, capsys, words, error):
    with pytest.raises(SystemExit):
        main([str(tmp_path), *words])
    assert error in capsys.readouterr().err
