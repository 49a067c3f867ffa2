"""Small tars for the tests of index and plan."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from warpcore.data.catalog import Catalog, open_catalog
from warpcore.data.shards import resolve_sources


def picture(width: int = 16, height: int = 12, kind: str = "JPEG", orientation: int | None = None) -> bytes:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, exif=exif)
    return content.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shard(path: Path, count: int, first: int = 0, sizes: tuple[tuple[int, int], ...] = ((16, 12),)) -> Path:
    """A shard of `count` samples with the keys first, first + 1, ... and the pictures' (width, height) in turn."""
    members = []
    for number in range(first, first + count):
        width, height = sizes[number % len(sizes)]
        members.append((f"{number:06d}.jpg", picture(width, height)))
        members.append((f"{number:06d}.json", json.dumps({"score": number / 10, "parity": number % 2}).encode()))
        members.append((f"{number:06d}.txt", f"caption {number}".encode()))
    members.append((f".{path.name}", b""))  # tars of other names are other data
    return write_tar(path, members)


def catalog_of(*paths: object) -> Catalog:
    return open_catalog(resolve_sources([path if isinstance(path, dict) else str(path) for path in paths]))
