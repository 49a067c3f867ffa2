"""How well a mini that draws videos leads from one given picture to another, and changes a given clip.

    python3 benchmarks/clip_edits.py runs/quickstart_video
    python3 benchmarks/clip_edits.py runs/quickstart_video --number 40 --grid edits.png guidance=4

Connected: the first and the last frame of a true clip of a direction are given; between them, the thing should go from
its one place to the other without turning back. Edited: a true clip is drawn again from a share of noise on, with a
sentence of another colour; the colour should change, and the rest stay. From all of the noise nothing is left of the
clip: that row says what the sentence alone does. Keys of inference/text_to_video.py may follow.
"""

import warpcore.openmp
import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.clip_scorer import look
from benchmarks.clip_seams import SEAM_PX, RunClips, distance, place, scenes, videos_of
from tools.demo_clips import DIRECTIONS, MovingScene, caption
from tools.demo_scenes import COLOURS, SEEN_PAIRS, is_held_out, pick
from warpcore.clips import encode_mp4, strip
from warpcore.errors import run_script
from warpcore.pictures import grid, save_png

START = 4
"""The frame of true clips, where these are long enough, that drawn ones begin with."""
RATIOS = (0.4, 0.6, 0.8, 1.0)
"""Shares of noise from which given clips are drawn again."""
BACK_PX = 1.0
"""A thing that moves back by no more from one frame to the next does not turn back: outlines are whole pixels."""
SHOWN = 2
"""Cases in the sheet; frames of each clip there are `SHOWN_FRAMES`."""
SHOWN_FRAMES = 9


@dataclass(frozen=True)
class Way:
    """How the thing of a clip goes from its first place to its last."""

    is_monotone: bool
    """It is seen in all frames, and never turns back."""
    largest_step_px: float


def way(clip: np.ndarray) -> Way:
    """clip: uint8 (T, H, W, 3), whose thing is at different places in the first and the last frame."""
    places = [place(frame) for frame in clip]
    if any(one is None for one in places):
        return Way(False, float("inf"))
    steps = np.diff(places, axis=0)
    whole = places[-1] - places[0]
    along = steps @ whole / max(np.hypot(*whole), 1e-9)
    return Way(bool((along >= -BACK_PX).all()), float(np.hypot(*steps.T).max()))


def recoloured(scene: MovingScene, seed: int) -> tuple[MovingScene, str]:
    """A scene in another colour, and a sentence for it that the demo set never uses."""
    rng = np.random.default_rng(seed)
    able = tuple(name for name in COLOURS if name != scene.colour and (name, scene.shape) in SEEN_PAIRS)
    other = replace(scene, colour=pick(rng, able))
    while not is_held_out(text := caption(other, rng)):
        pass
    return other, text


def connected(run: str, number: int, keys: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Print how clips lead from a picture to another; returns what the sheet shows, with a text each."""
    clips, cases = RunClips.of(run), scenes(number, [*DIRECTIONS], seed=3)
    true = [clips.true(scene, START) for scene, _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        prompts = []
        for i, (clip, (_, text)) in enumerate(zip(true, cases, strict=True)):
            files = [f"{folder}/{i}_{name}.png" for name in ("first", "last")]
            for file, frame in zip(files, (clip[0], clip[-1]), strict=True):
                save_png(file, frame)
            prompts.append(text + json.dumps({"reference_path": ";".join(files), "mask_strategy": "0;0,1,0,-1,1"}))
        drawn = videos_of(run, prompts, keys)
    ends = [[distance(clip[i], own[i]) for clip, own in zip(drawn, true, strict=True)] for i in (0, -1)]
    ways, true_ways = ([way(clip) for clip in clips] for clips in (drawn, true))
    first, last = (f"{_share(np.array(one) <= SEAM_PX)} (median {np.median(one):.1f} px)" for one in ends)
    print(f"connected: the thing within {SEAM_PX:g} px of its true place in the first frame in {first}, in the last "
          f"in {last}; a monotone path between in {_share([one.is_monotone for one in ways])}, with largest steps of "
          f"{_median_step(ways):.1f} px (true: {_share([one.is_monotone for one in true_ways])}, "
          f"{_median_step(true_ways):.1f} px)")  # fmt: skip
    pairs = zip(cases, drawn, true, strict=True)
    return [
        cell
        for (_, text), clip, own in list(pairs)[:SHOWN]
        for cell in ((f"{text}; given: the first and the last", strip(own, 2)), (text, strip(clip, SHOWN_FRAMES)))
    ]


def edited(run: str, number: int, keys: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Print what of given clips stays, and what a sentence changes; returns what the sheet shows, with a text each."""
    clips, cases = RunClips.of(run), [scene for scene, _ in scenes(number, [*DIRECTIONS], seed=4)]
    true, others = (
        [clips.true(scene, START) for scene in cases],
        [recoloured(scene, i) for i, scene in enumerate(cases)],
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, clip in enumerate(true):
            Path(folder, f"{i}.mp4").write_bytes(encode_mp4(clip, clips.fps, crf=0))
        for ratio in RATIOS:
            prompts = [
                text + json.dumps({"reference_path": f"{folder}/{i}.mp4",
                                   "mask_strategy": f"0,0,0,0,{clips.latent_frames},{ratio}"})
                for i, (_, text) in enumerate(others)
            ]  # fmt: skip
            found[ratio] = videos_of(run, prompts, keys)
    print(f"\nedited: {number} clips; shares that have the sentence's colour, and the given clip's; its motion, its "
          f"shape; frames whose thing is within {SEAM_PX:g} px of where it was")  # fmt: skip
    names = ("new colour", "old colour", "motion", "shape", "place")
    print("| from this share of noise | " + " | ".join(names) + " |\n|---" + len(names) * "|---" + "|")
    for ratio, drawn in found.items():
        seen = [look(clip) for clip in drawn]
        near = [
            distance(frame, own) <= SEAM_PX
            for clip, one in zip(drawn, true, strict=True) for frame, own in zip(clip, one, strict=True)
        ]  # fmt: skip
        pairs = list(zip(seen, cases, others, strict=True))
        shares = (
            [one.colour == other.colour for one, _, (other, _) in pairs],
            *([getattr(one, name) == getattr(scene, name) for one, scene, _ in pairs]
              for name in ("colour", "motion", "shape")),
            near,
        )  # fmt: skip
        print(f"| {ratio:g} | " + " | ".join(map(_share, shares)) + " |")
    cells = []
    for i, (_, text) in enumerate(others[:SHOWN]):
        cells.append(("given", strip(true[i], SHOWN_FRAMES)))
        cells += [(f"{text}, from {ratio:g}", strip(drawn[i], SHOWN_FRAMES)) for ratio, drawn in found.items()]
    return cells


def _share(right: Sequence[bool]) -> str:
    return f"{100 * np.mean(right):.0f}%"


def _median_step(ways: Sequence[Way]) -> float:
    return float(np.median([one.largest_step_px for one in ways]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--number", type=int, default=20, help="clips of each kind")
    parser.add_argument("--grid", type=Path, help="a PNG to write that shows some of them")
    options, keys = parser.parse_known_args()
    keys = ["batch_size=10", *keys]
    shown = [(text, cell) for kind in (connected, edited) for text, cell in kind(options.run, options.number, keys)]
    if options.grid:
        texts, cells = zip(*shown, strict=True)
        save_png(options.grid, grid(cells, 1, texts))


if __name__ == "__main__":
    run_script(main)
