"""Tars of small clips for tests of training scripts."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from warpcore.clips import encode_mp4

FPS = 4


def write_clips(
    path: Path,
    count: int,
    first: int = 0,
    size: tuple[int, int] = (32, 32),
    frames: int = 5,
    damage: Callable[[bytes], bytes] = bytes,
) -> Path:
    """A tar of clips at 4 frames per second, each with a caption, a class and a motion score.

    damage: what is done to each file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            about = {"caption": f"picture w{i % 7}", "flow": i / 2, "label": i % 5}
            members = {"mp4": damage(encode_mp4(clip(i, size, frames), FPS)), "txt": about["caption"].encode()}
            members |= {"cls": str(i % 5).encode(), "json": json.dumps(about).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def without_pictures(video: bytes) -> bytes:
    """An mp4 whose header is whole, and whose frames are zeros."""
    begin = video.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(video[begin - 8 : begin - 4], "big")
    return video[:begin] + bytes(end - begin) + video[end:]


def clip(number: int, size: tuple[int, int], frames: int) -> np.ndarray:
    """uint8 (T, H, W, 3): coarse random colours, other ones in each frame."""
    coarse = np.random.default_rng(number).integers(0, 256, (frames, size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
