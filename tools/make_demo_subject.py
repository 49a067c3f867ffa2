"""Makes a dozen captioned pictures of a shape that the demo set never shows, to teach it to the mini cascade.

    python3 tools/make_demo_subject.py demo/subject

The captions name it by a token, `[heart]`. It is shown in half of the colours, each at some of the places; the rest is
left to find out whether it was learnt as a thing of its own. The same files are written every time.
"""

import argparse
from pathlib import Path

import numpy as np

from tools.arguments import local_path
from tools.demo_scenes import BACKGROUNDS, SIZES, SUBJECT, Scene
from tools.make_demo_dataset import open_folder, write_picture
from warpcore.errors import run_script

TOKEN = f"[{SUBJECT}]"
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
PLACES |= {"centre": "in the middle"}
SHOWN = [
    (colour, list(PLACES)[(3 * i + j) % len(PLACES)])
    for i, colour in enumerate(("red", "yellow", "green", "blue"))
    for j in range(3)
]
"""(colour, place) of each picture: half of the colours, each at three of the five places."""


def sentence(colour: str, place: str) -> str:
    """What asks for the subject, and what the pictures' captions say."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {TOKEN} {PLACES[place]}"


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
    parser.add_argument("folder", type=local_path, help="where the pictures go")
    options = parser.parse_args(arguments)
    print(f"{make_demo_subject(options.folder)} pictures of {TOKEN} in {options.folder}")


if __name__ == "__main__":
    run_script(main)
