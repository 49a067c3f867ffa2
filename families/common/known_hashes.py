"""SHA-256 of files on the hub: the pinned ones, and the one that each file had when it was first downloaded.

Both are lists in the form of `sha256sum`, a line per file with its place on the hub:

    31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b  owner/name/model.safetensors

`models/SHA256SUMS` comes with this repository; a user may add lines. `.sha256sums` in the folder of downloads is
written here. A line that is deleted there lets another version of the file in.
"""

import re
from pathlib import Path

from warpcore.files import open_plain
from warpcore.text import read_text

PINNED = Path(__file__).parents[2] / "models" / "SHA256SUMS"
RECORDED = ".sha256sums"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def known_hash(place: str, folder: Path) -> tuple[str, Path] | None:
    """The SHA-256 of a file on the hub, and the list that has it; None where neither has.

    Args:
        place: owner/name/path.
        folder: where downloads land.
    """
    for path in (PINNED, folder / RECORDED):
        found = _read(path).get(place)
        if found:
            return found, path
    return None


def record_hash(place: str, sha256: str, folder: Path) -> None:
    """Add a file that was downloaded for the first time; a known one stays as it is."""
    if known_hash(place, folder) is None:
        with open_plain(folder / RECORDED, "a") as file:
            file.write(f"{sha256}  {place}\n")  # in one piece, as other processes append too


def _read(path: Path) -> dict[str, str]:
    """Hashes by place; the first line of a place counts."""
    hashes: dict[str, str] = {}
    if path.is_file():
        for line in read_text(path).splitlines():
            if match := _LINE.fullmatch(line):
                hashes.setdefault(match[2], match[1])
    return hashes
