"""Makes a dozen captioned pictures of a shape that the demo set never shows, to teach it to the mini cascade.

    python3 tools/make_demo_subject.py demo/subject

The captions name it by a token, `[heart]`. It is shown in some colours at some places; the others are left to find out
whether it was learnt as a thing of its own. The same files are written every time.
"""

import argparse
from pathlib import Path

import numpy as np

from tools.demo_scenes import BACKGROUNDS, SIZES, SUBJECT, Scene
from tools.make_demo_dataset import write_picture

TOKEN = f"[{SUBJECT}]"
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
PLACES |= {"centre": "in the middle"}
SHOWN_COLOURS = ("red", "yellow", "green", "blue")
SHOWN_PLACES = ("left", "right", "centre")


def make_demo_subject(folder: Path, seed: int = 0) -> int:
    """Writes a picture of each shown colour at each shown place into `folder`; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 12])
    shown = [(colour, place) for colour in SHOWN_COLOURS for place in SHOWN_PLACES]
    for number, (colour, place) in enumerate(shown):
        background, size = (str(rng.choice(options)) for options in (BACKGROUNDS, list(SIZES)))
        scene = Scene(SUBJECT, colour, place, 1, size, background, seed=int(rng.integers(2**62)))
        write_picture(folder / f"{number:02d}", scene, f"a {colour} {TOKEN} {PLACES[place]}")
    return len(shown)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args(arguments)
    print(f"{make_demo_subject(options.folder)} pictures of {TOKEN} in {options.folder}")


if __name__ == "__main__":
    main()
