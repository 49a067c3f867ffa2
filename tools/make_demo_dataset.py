"""Makes a folder of captioned pictures of coloured shapes, to try the whole project on.

    python3 tools/make_demo_dataset.py demo/pictures --num_pictures 6000

Every picture NAME.jpg has its caption in NAME.txt and, in NAME.json, an aesthetic score (a few spoiled pictures score
below 4.5), its size and what it shows. The same options always write the same files.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from tools.arguments import local_path, positive, seed
from tools.demo_scenes import SEEN_PAIRS, UNSEEN_PAIRS, Scene, captioned_scene, render, score
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_folder

_PICTURES_PER_FOLDER = 1000
_SPOILED = 0.06
_MARKER = ".demo_dataset"


def make_demo_dataset(folder: Path, num_pictures: int, seed: int = 0, held_out: bool = False) -> None:
    """Writes the pictures into sub-folders of `folder`.

    With `held_out` they show the sentences and the (colour, shape) pairs that the demo set never has.
    An earlier demo set in it is written over. Raises UserError for a folder that holds something else.
    """
    stale = sum(1 for _ in folder.glob("*/*.jpg")) if folder.exists() else 0
    if stale > num_pictures:
        raise UserError(f"{folder} holds {stale} pictures already, more than {num_pictures}; remove it first")
    open_folder(folder)
    rng = np.random.default_rng([seed, held_out])
    pairs = SEEN_PAIRS + tuple(sorted(UNSEEN_PAIRS)) if held_out else SEEN_PAIRS
    for number in range(num_pictures):
        scene, text = captioned_scene(rng, pairs, held_out, 0.0 if held_out else _SPOILED)
        stem = folder / f"{number // _PICTURES_PER_FOLDER:03d}" / f"{number:06d}"
        if number % _PICTURES_PER_FOLDER == 0:
            stem.parent.mkdir(parents=True, exist_ok=True)
        description = {
            "caption": text,
            "aesthetic_score": score(scene, rng),
            "width": scene.width,
            "height": scene.height,
        }
        description |= {"shape": scene.shape, "colour": scene.colour, "position": scene.position, "count": scene.count}
        write_picture(stem, scene, text)
        stem.with_suffix(".json").write_text(json.dumps(description) + "\n", encoding="utf-8")


def open_folder(folder: Path) -> None:
    """Make and mark a folder for pictures of the demo world.

    Raises:
        UserError: it holds something else, which could be overwritten.
    """
    check_folder(folder, "the pictures")
    marker = folder / _MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"{folder} is not empty and no demo data set; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("made by a demo tool of Warpcore, which writes over what lies here\n", encoding="utf-8")


def write_picture(stem: Path, scene: Scene, text: str) -> None:
    """Writes a scene as STEM.jpg with its caption in STEM.txt."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(render(scene), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    stem.with_suffix(".jpg").write_bytes(encoded.tobytes())
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=local_path, help="where the pictures go")
    parser.add_argument("--num_pictures", type=positive, default=6000)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--held_out", action="store_true", help="sentences and pairs that the demo set never shows")
    options = parser.parse_args(arguments)
    make_demo_dataset(options.folder, options.num_pictures, options.seed, options.held_out)
    print(f"{options.num_pictures} pictures with captions and scores in {options.folder}")


if __name__ == "__main__":
    run_script(main)
