"""True clips are connected, edited and seen to be; turns, jumps and frames without a thing are seen, too."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import clip_edits
from benchmarks.clip_edits import RATIOS, SHOWN, START, connected, edited, recoloured, way
from benchmarks.clip_seams import RunClips, scenes
from families.open_sora.prompts import parse_prompt
from tools.demo_clips import DIRECTIONS, describe

pytestmark = pytest.mark.integration
CLIPS = RunClips(frames=17, latent_frames=5, step=1)


def test_a_way_leads_on_turns_back_or_jumps():
    ((scene, _),) = scenes(1, [*DIRECTIONS], seed=8)
    clip = CLIPS.true(scene, START)
    assert way(clip).is_monotone
    assert way(clip).largest_step_px < 3
    back = way(clip[[*range(9), *range(6, 0, -1), CLIPS.frames - 1]])
    assert not back.is_monotone
    jump = way(clip[[0] * 8 + [CLIPS.frames - 1] * 8])
    assert jump.is_monotone
    assert jump.largest_step_px > 15
    clip[3] = 128
    assert not way(clip).is_monotone


def test_another_colour_is_all_that_a_sentence_changes():
    for number, (scene, _) in enumerate(scenes(3, [*DIRECTIONS], seed=9)):
        other, text = recoloured(scene, number)
        wanted = describe(text)
        assert wanted.pop("colour") == other.colour != scene.colour
        assert wanted == {"motion": scene.motion, "shape": scene.shape, "position": scene.position}


def test_true_clips_have_all_points(monkeypatch, capsys):
    """What is given to the network can be read, and goes where it should."""
    number, asked = SHOWN, []

    def videos_of(run, prompts, keys):
        found = [parse_prompt(prompt) for prompt in prompts]
        assert all(Path(file).is_file() for prompt in found for file in prompt.references)
        asked.append([(one.reference, one.start, one.length, one.edit) for one in found[0].placements])
        cases = [scene for scene, _ in scenes(number, [*DIRECTIONS], seed=3 if len(asked) == 1 else 4)]
        if len(asked) > 1 and asked[-1][0][-1] > 0.5:  # the sentence is followed from here on
            cases = [recoloured(scene, i)[0] for i, scene in enumerate(cases)]
        return [CLIPS.true(scene, START) for scene in cases]

    monkeypatch.setattr(clip_edits, "videos_of", videos_of)
    monkeypatch.setattr(RunClips, "of", lambda run: CLIPS)
    cells = connected("run", number, []) + edited("run", number, [])
    assert asked == [[(0, 0, 1, 0), (1, -1, 1, 0)], *([(0, 0, CLIPS.latent_frames, ratio)] for ratio in RATIOS)]
    said = capsys.readouterr().out
    assert (
        "first frame in 100% (median 0.0 px), in the last in 100% (median 0.0 px); a monotone path between in 100%"
        in said
    )
    assert "| 0.4 | 0% | 100% | 100% | 100% | 100% |" in said
    assert "| 0.6 | 100% | 0% | 100% | 100% | 100% |" in said
    assert len(cells) == SHOWN * (2 + 1 + len(RATIOS))
    assert all(np.asarray(cell).ndim == 3 for _, cell in cells)
