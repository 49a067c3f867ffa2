"""Makes a dozen captioned pictures, or clips, of a shape that the demo sets never show, to teach it to a mini.

    python3 tools/make_demo_subject.py demo/subject
    python3 tools/make_demo_subject.py --video demo/subject_clips

The captions name it by a token, `[heart]`. It is shown in half of the colours, each at some of the places, in clips in
some of the motions; the rest is left to find out whether it was learnt as a thing of its own. The same files are
written every time.
"""

import argparse
from pathlib import Path

import numpy as np

from tools import demo_clips
from tools.arguments import local_path
from tools.demo_clips import MOTIONS, MovingScene, lanes
from tools.demo_scenes import BACKGROUNDS, SIZES, SUBJECT, Scene
from tools.make_demo_dataset import open_folder, write_picture
from warpcore.clips import encode_mp4
from warpcore.errors import run_script

TOKEN = f"[{SUBJECT}]"
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
PLACES |= {"centre": "in the middle"}
COLOURS_SHOWN = ("red", "yellow", "green", "blue")
SHOWN = [(colour, list(PLACES)[(3 * i + j) % len(PLACES)]) for i, colour in enumerate(COLOURS_SHOWN) for j in range(3)]
"""(colour, place) of each picture: half of the colours, each at three of the five places."""
MOTIONS_SHOWN = [
    (colour, MOTIONS[(3 * i + j) % len(MOTIONS)]) for i, colour in enumerate(COLOURS_SHOWN) for j in range(3)
]
"""(colour, motion) of each clip: half of the colours, each in three of the seven motions."""


def sentence(colour: str, place: str) -> str:
    """What asks for the subject, and what the pictures' captions say."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {TOKEN} {PLACES[place]}"


def moving_sentence(colour: str, motion: str) -> tuple[str, str]:
    """The same of a clip, and the place that it names: the first of the motion's lanes."""
    place = lanes(motion)[0]
    wording, surroundings = demo_clips.VERBS[motion][0], demo_clips.PLACES[place][0]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {TOKEN} {wording} {surroundings}", place


def make_moving_subject(folder: Path, seed: int = 0) -> int:
    """Writes a clip of each shown colour and motion; see `make_demo_subject`."""
    open_folder(folder)
    rng = np.random.default_rng([seed, len(MOTIONS_SHOWN), 1])
    for number, (colour, motion) in enumerate(MOTIONS_SHOWN):
        text, place = moving_sentence(colour, motion)
        scene = MovingScene(motion, SUBJECT, colour, place, str(rng.choice(BACKGROUNDS)), int(rng.integers(2**62)))
        stem = folder / f"{number:02d}"
        stem.with_suffix(".mp4").write_bytes(encode_mp4(demo_clips.render(scene), demo_clips.FPS))
        stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return len(MOTIONS_SHOWN)


def make_demo_subject(folder: Path, seed: int = 0) -> int:
    """Writes a picture of each shown colour and place into `folder`; returns their number.

    Raises UserError for a folder that holds something else than an earlier one of its kind.
    """
    open_folder(folder)
    rng = np.random.default_rng([seed, len(SHOWN)])
    for number, (colour, place) in enumerate(SHOWN):
        background, size = (str(rng.choice(options)) for options in (BACKGROUNDS, list(SIZES)))
        scene = Scene(SUBJECT, colour, place, 1, size, background, seed=int(rng.integers(2**62)))
        write_picture(folder / f"{number:02d}", scene, sentence(colour, place))
    return len(SHOWN)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=local_path, help="where the pictures or clips go")
    parser.add_argument("--video", action="store_true", help="clips of it that move, turn, grow or stay")
    options = parser.parse_args(arguments)
    make, noun = (make_moving_subject, "clips") if options.video else (make_demo_subject, "pictures")
    print(f"{make(options.folder)} {noun} of {TOKEN} in {options.folder}")


if __name__ == "__main__":
    run_script(main)
