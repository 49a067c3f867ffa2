"""Caches for tests: a data set with masks, and `tools/cache.py` run on it."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tools import cache

cache.TIMED_SAMPLES = 8  # no test looks at times
SCRIPTS = Path(__file__).parents[1] / "train"
SIZES = ((64, 96), (64, 64), (48, 128), (96, 64))
"""(H, W) in px of the pictures, in turn: two buckets, and something to crop."""


def write_pictures(
    path: Path, count: int, first: int = 0, broken: tuple[int, ...] = (), caption: str = "picture w{}"
) -> Path:
    """A tar of random pictures, every other one with a mask; those in `broken` end early."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            draw = np.random.default_rng(i)
            shape = SIZES[i % len(SIZES)]
            picture = _png(draw.integers(0, 256, (*shape, 3), dtype=np.uint8))
            members = {"png": picture[: len(picture) // 2] if i in broken else picture}
            if i % 2:
                members["mask.png"] = _png((draw.random(shape) > 0.5).astype(np.uint8) * 255)
            members |= {"txt": caption.format(i % 7).encode(), "json": json.dumps({"score": i}).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def make_cache(script: str, settings: dict, out: Path, *options: str) -> Path:
    """Run the tool for a training with these settings."""
    config = out.with_name(f"{out.name}.{os.getpid()}.yaml")  # several processes may make one cache
    config.write_text(yaml.safe_dump(settings))
    cache.main([str(SCRIPTS / f"{script}.py"), str(config), str(out), *options])
    return out


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
