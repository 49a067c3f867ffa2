"""SHA-256 of weights files, remembered on this machine by their size and time of change: hashing 10 GB takes long."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from families.common.weight_files import files_of
from warpcore.data.sidecars import ABSENT, cache_locations
from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.safe_json import load_json

SUFFIX = ".sha256.json"
SETTLED_SECONDS = 2.0
"""A file that changed more recently is not remembered: it may change again within the resolution of its time."""

logger = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as `sha256sum` prints it; read again only where the file changed."""
    places = cache_locations(str(path.resolve()), SUFFIX)
    version = _version(path)
    for place in places:
        if known := _remembered(place, version):
            return known
    with open_to_read(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if _version(path) == version and time.time() - version[1] / 1e9 > SETTLED_SECONDS:
        _remember(places, version, found)
    return found


def sha256_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of a file; of several, or of folders of a library's networks, that of the hashes of their weights.

    Raises:
        UserError: a folder holds no weights.
    """
    files = [file for path in paths for file in (_weights_in(path) if path.is_dir() else files_of(path))]
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _weights_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights (.safetensors)")
    return files


def _version(path: Path) -> list[int]:
    """Size in bytes, time of change in ns, and inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _remembered(place: str, version: list[int]) -> str | None:
    try:
        with open_to_read(place) as file:
            known = load_json(file)
        return known["sha256"] if known["version"] == version else None
    except ABSENT:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s can't be read (%s): the file is hashed again", place, error)
        return None


def _remember(places: list[str], version: list[int], found: str) -> None:
    refusals = []
    for place in places:
        aside = f"{place}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(aside, "w", encoding="ascii") as file:
                json.dump({"version": version, "sha256": found}, file)
            os.replace(aside, place)
            return
        except OSError as error:
            refusals.append(f"{place}: {error.strerror}")
    logger.warning("weights are hashed again at the next start: %s", "; ".join(refusals))
