"""The scorer of clips sees motion, colour, shape and place as people do, and tells wrong clips apart."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks import clips
from benchmarks.clip_scorer import ATTRIBUTES, accuracy, attributes_of, look, score, sentences
from tools.demo_clips import MOTIONS, ROUND, MovingScene, describe, lanes, random_scene, render
from tools.demo_scenes import COLOURS, SHAPES

pytestmark = pytest.mark.integration
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def soft(clip: np.ndarray) -> np.ndarray:
    """As an autoencoder leaves it: blurred, with noise, and the first 16 frames only."""
    noise = np.random.default_rng(0).normal(0, 6, clip.shape)
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip])
    return np.clip(frames + noise, 0, 255).astype(np.uint8)[:16]


@pytest.mark.parametrize(
    ("view", "number"),
    [(lambda clip: clip, 24), (soft, 16), (lambda clip: clip[8:], 16)],
    ids=["whole", "soft", "end"],
)
def test_the_scorer_recognises_true_clips(view, number):
    cases = sentences(number, ALL_PAIRS, seed=5)
    shares = accuracy([view(render(scene)) for scene, _ in cases], [describe(text) for _, text in cases])
    assert list(shares) == [*ATTRIBUTES, "direction", "all"]
    assert min(shares.values()) >= 0.98, shares


def test_the_scorer_sees_what_is_wrong():
    rng = np.random.default_rng(12)
    for _ in range(8):
        scene = random_scene(rng)
        wanted = {name: getattr(scene, name) for name in ATTRIBUTES}
        motions = [one for one in MOTIONS if one != scene.motion and scene.position in lanes(one)]
        other = {
            "colour": next(colour for colour in COLOURS if colour != scene.colour),
            "shape": next(shape for shape in SHAPES if shape not in (scene.shape, *ROUND)),
            "position": next(one for one in lanes(scene.motion) if one != scene.position),
            "motion": next(one for one in motions if one != "turn" or scene.shape not in ROUND),
        }
        for attribute, value in other.items():
            result = score(render(replace(scene, **{attribute: value})), wanted)
            assert not result.pop(attribute), (scene, attribute, value)
            assert all(result.values()), (scene, attribute, value)


def test_a_frozen_or_reversed_clip_does_not_move_as_told():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": None}
    rng = np.random.default_rng(2)
    seen = set()
    while seen < opposite.keys():
        scene = random_scene(rng)
        clip = render(scene)
        assert look(np.repeat(clip[:1], len(clip), axis=0)).motion == "stay"
        if scene.motion in opposite:
            assert look(clip[::-1]).motion == opposite[scene.motion]
        seen.add(scene.motion)


def test_a_turning_star_turns_in_clips_of_six_frames_too():
    """As the mini Latte draws them: a star looks the same after a fifth of a turn, and few frames lie between."""
    scenes = [MovingScene("turn", "star", "red", "centre", seed=seed) for seed in range(12)]
    assert [look(render(scene)[2:23:4]).motion for scene in scenes] == ["turn"] * len(scenes)


def test_clips_that_show_nothing_or_noise_are_wrong():
    rng = np.random.default_rng(0)
    nothing = np.full((16, 64, 64, 3), 128, np.uint8)
    shown = nothing.copy()
    shown[:8] = render(random_scene(rng))[:8]
    wanted = {"motion": "stay", "colour": "red", "shape": "star", "position": "left"}
    assert not any(score(nothing, wanted).values())
    assert not any(score(shown, wanted).values())  # the thing vanishes in the middle
    noise = [rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8) for _ in range(5)]
    assert accuracy(noise, [wanted] * 5)["all"] == 0


def test_names_of_motions_are_asked_for_as_sentences_are():
    assert attributes_of("up") == {"motion": "up"}
    assert attributes_of("a red box rises at the centre") == {
        "motion": "up", "colour": "red", "shape": "square", "position": "centre",
    }  # fmt: skip


class Drawing:
    """Draws the true clips of given scenes."""

    best, draws_classes, draws_clips = "drawn", True, True

    def __init__(self, wrong: int):
        self.wrong = wrong

    def draw(self, prompts, seed):
        """Every `wrong`th clip shows the next motion."""
        places = [MOTIONS.index(name) + (number % self.wrong == 1) for number, name in enumerate(prompts)]
        motions = [MOTIONS[place % len(MOTIONS)] for place in places]
        scene = replace(random_scene(np.random.default_rng(seed)), shape="star", position="centre")
        return {"drawn": [render(replace(scene, motion=motion)) for motion in motions]}

    def rebuild(self, clips, texts):
        return {"autoencoder": [np.zeros_like(clip) for clip in clips]}

    def notes(self, clips):
        return ["a note"]


@pytest.mark.parametrize(("wrong", "share", "said"), [(28, "93.8", "reached"), (2, "50.0", "missed")])
def test_a_model_of_motions_is_scored_by_its_directions(capsys, wrong, share, said):
    drawn, columns, titles = clips.report(Drawing(wrong), 28, 1)
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["drawn"][1] == share
    assert len(rows["drawn"]) == 4  # motions alone say nothing of colour, shape and place
    assert rows["rebuilt:"][-1] == "0.0"
    assert f"target (direction 90): {said}" in printed
    assert "a note" in printed
    assert (len(drawn), columns, titles[:2]) == (28, 4, ["left", "right"])
