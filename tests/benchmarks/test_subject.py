"""The demo subject and its scorer."""

import numpy as np

from benchmarks.subject import fidelity, moving_prompts, subject_prompts
from tools import demo_clips
from tools.demo_clips import MOTIONS, MovingScene
from tools.demo_scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SUBJECT, Scene, render
from tools.make_demo_subject import main


def scenes(shape: str) -> tuple[list[np.ndarray], list[tuple[str, str, str]]]:
    prompts = subject_prompts(shown=True) + subject_prompts(shown=False)
    pictures = [
        render(Scene(shape, colour, place, background=BACKGROUNDS[i % 5], seed=i))
        for i, (_, colour, place) in enumerate(prompts)
    ]
    return pictures, prompts


def test_the_scorer_knows_the_subject_its_colour_and_its_place():
    pictures, prompts = scenes(SUBJECT)
    assert len(prompts) == len(COLOURS) * len(POSITIONS)
    assert min(fidelity(pictures, prompts).values()) >= 0.97
    elsewhere = [(text, "red" if colour != "red" else "blue", place) for text, colour, place in prompts]
    assert fidelity(pictures, elsewhere)["colour"] == 0
    for shape in SHAPES:
        assert fidelity(scenes(shape)[0], prompts)["subject"] == 0, shape


def moving(shape: str, every: int = 1) -> tuple[list[np.ndarray], list[tuple[str, ...]]]:
    prompts = (moving_prompts(shown=True) + moving_prompts(shown=False))[::every]
    clips = [
        demo_clips.render(MovingScene(motion, shape, colour, place, BACKGROUNDS[i % 5], seed=i))
        for i, (_, colour, place, motion) in enumerate(prompts)
    ]
    return clips, prompts


def test_the_scorer_knows_the_subject_in_motion():
    clips, prompts = moving(SUBJECT)
    assert len(prompts) == len(COLOURS) * len(MOTIONS)
    found = fidelity(clips, prompts)
    assert list(found) == ["subject", "colour", "place", "motion"]
    assert min(found.values()) >= 0.97, found
    assert fidelity(clips[1:], prompts[:-1])["motion"] < 0.2
    for shape in SHAPES:
        assert fidelity(moving(shape, every=14)[0], prompts[::14])["subject"] == 0, shape


def test_the_moving_subject_is_a_dozen_clips_that_are_always_the_same(tmp_path):
    for name in ("one", "two"):
        main(["--video", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "one").glob("[!.]*"))
    assert files == sorted(f"{i:02d}.{extension}" for i in range(12) for extension in ("mp4", "txt"))
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    captions = {(tmp_path / "one" / name).read_text().strip() for name in files if name.endswith(".txt")}
    assert captions == {text for text, *_ in moving_prompts(shown=True)}
    assert "a red [heart] moves to the left at the top" in captions


def test_the_subject_is_a_dozen_pictures_that_are_always_the_same(tmp_path):
    for name in ("one", "two"):
        main([str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "one").glob("[!.]*"))
    assert files == sorted(f"{i:02d}.{extension}" for i in range(12) for extension in ("jpg", "txt"))
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    captions = {(tmp_path / "one" / name).read_text().strip() for name in files if name.endswith(".txt")}
    assert captions == {text for text, *_ in subject_prompts(shown=True)}
