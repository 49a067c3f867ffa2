"""Makes a folder of captioned pictures of coloured shapes, or of clips of moving ones, to try the whole project on.

    python3 tools/make_demo_dataset.py demo/pictures --num_pictures 6000
    python3 tools/make_demo_dataset.py --video demo/videos

Every picture NAME.jpg has its caption in NAME.txt and, in NAME.json, an aesthetic score (a few spoiled pictures score
below 4.5), its size and what it shows. Every clip NAME.mp4 has its caption in NAME.txt, the number of its motion in
NAME.cls, and in NAME.json what it shows. The same options always write the same files.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from tools import demo_clips
from tools.arguments import local_path, positive, seed
from tools.demo_scenes import SEEN_PAIRS, UNSEEN_PAIRS, Scene, captioned_scene, render, score
from warpcore.clips import encode_mp4
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_folder

NUM_PICTURES, NUM_VIDEOS = 6000, 1200
_SAMPLES_PER_FOLDER = 1000
_SPOILED = 0.06
_MARKER = ".demo_dataset"


def make_demo_dataset(folder: Path, number: int, seed: int = 0, held_out: bool = False, video: bool = False) -> None:
    """Writes pictures, or with `video` clips, into sub-folders of `folder`.

    With `held_out` they show the sentences and the (colour, shape) pairs that the demo set never has.
    An earlier demo set in it is written over. Raises UserError for a folder that holds something else.
    """
    make: Callable = _write_video if video else _write_picture
    for ending, noun, most in (("jpg", "pictures", 0 if video else number), ("mp4", "clips", number if video else 0)):
        stale = sum(1 for _ in folder.glob(f"*/*.{ending}")) if folder.exists() else 0
        if stale > most:
            raise UserError(f"{folder} holds {stale} {noun} already, more than {most}; remove it first")
    open_folder(folder)
    rng = np.random.default_rng([seed, held_out])
    pairs = SEEN_PAIRS + tuple(sorted(UNSEEN_PAIRS)) if held_out else SEEN_PAIRS
    for count in range(number):
        stem = folder / f"{count // _SAMPLES_PER_FOLDER:03d}" / f"{count:06d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        description = make(stem, rng, pairs, held_out)
        stem.with_suffix(".json").write_text(json.dumps(description) + "\n", encoding="utf-8")


def _write_picture(stem: Path, rng: np.random.Generator, pairs: tuple, held_out: bool) -> dict[str, object]:
    """Writes a random scene; returns what it is."""
    scene, text = captioned_scene(rng, pairs, held_out, 0.0 if held_out else _SPOILED)
    about = {
        "caption": text,
        "aesthetic_score": score(scene, rng),
        "width": scene.width,
        "height": scene.height,
    }
    write_picture(stem, scene, text)
    return about | {"shape": scene.shape, "colour": scene.colour, "position": scene.position, "count": scene.count}


def _write_video(stem: Path, rng: np.random.Generator, pairs: tuple, held_out: bool) -> dict[str, object]:
    """Writes a random moving scene; returns what it is."""
    scene, text = demo_clips.captioned_scene(rng, pairs, held_out)
    stem.with_suffix(".mp4").write_bytes(encode_mp4(demo_clips.render(scene), demo_clips.FPS))
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".cls").write_text(f"{demo_clips.MOTIONS.index(scene.motion)}\n", encoding="utf-8")
    about = {"caption": text, "motion": scene.motion, "shape": scene.shape, "colour": scene.colour}
    return about | {"position": scene.position}


def open_folder(folder: Path) -> None:
    """Make and mark a folder for pictures or clips of the demo world.

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
    parser.add_argument("folder", type=local_path, help="where the pictures or clips go")
    parser.add_argument("--video", action="store_true", help="clips of things that move, turn, grow or stay")
    numbers = parser.add_mutually_exclusive_group()
    numbers.add_argument("--num_pictures", type=positive, help=f"{NUM_PICTURES} by default")
    numbers.add_argument("--num_videos", type=positive, help=f"with --video; {NUM_VIDEOS} by default")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--held_out", action="store_true", help="sentences and pairs that the demo set never shows")
    options = parser.parse_args(arguments)
    if options.video and options.num_pictures:
        parser.error("--video makes clips: give --num_videos")
    if options.num_videos and not options.video:
        parser.error("--num_videos needs --video")
    number = options.num_videos or options.num_pictures or (NUM_VIDEOS if options.video else NUM_PICTURES)
    make_demo_dataset(options.folder, number, options.seed, options.held_out, options.video)
    what = "clips with captions" if options.video else "pictures with captions and scores"
    print(f"{number} {what} in {options.folder}")


if __name__ == "__main__":
    run_script(main)
