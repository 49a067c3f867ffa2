"""Files of pictures in folders: one walk, and one list of extensions, for every tool that lists pictures."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from warpcore.data.samples import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS
from warpcore.errors import UserError
from warpcore.text import printable

UNREAD_EXTENSIONS = (
    "heic", "heif", "jxl", "psd", "svg", "eps", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2",
)  # fmt: skip
"""Pictures for which there is no decoder here."""
SHOWN = 3
"""Files named for each reason in a report."""


class LeftOut:
    """Files that a tool leaves out, by reason."""

    def __init__(self):
        self.files: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, file: Path | str) -> None:
        self.files[reason].append(str(file))

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))

    def __str__(self) -> str:
        """A line for each reason, the most frequent first, with how many files it concerns and the first of them."""
        by_count = sorted(self.files.items(), key=lambda item: -len(item[1]))
        lines = [f"  {len(files)} {reason}: {', '.join(files[:SHOWN])}{', ...' * (len(files) > SHOWN)}"
                 for reason, files in by_count]  # fmt: skip
        return "\n".join([f"left out {len(self)}", *map(printable, lines)])


def extension(path: Path) -> str:
    """Lower case, without its dot."""
    return path.suffix.lower()[1:]


def is_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture which can be read."""
    return extension(path) in PICTURE_EXTENSIONS


def is_video(path: Path) -> bool:
    """Whether a file's name says that it is a video which can be read."""
    return extension(path) in VIDEO_EXTENSIONS


def _is_shown(path: Path) -> bool:
    return is_picture(path) or is_video(path)


def walk(folder: Path, left_out: LeftOut, without: Path | None = None) -> Iterator[list[Path]]:
    """The files of a folder and of its sub-folders, also linked ones, folder by folder and sorted by name.

    Each folder is listed once, under its own name rather than that of a link. Left out are hidden files and folders,
    and `without`, where a tool writes to.
    """
    own = None if without is None else os.path.realpath(without)
    seen = set()
    waiting, links = [folder], []
    while waiting or links:
        parent = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(parent)
        if real == own:
            continue
        if real in seen:
            left_out.add("a link to a folder that is listed already", parent.relative_to(folder))
            continue
        seen.add(real)
        try:
            entries = sorted(parent.iterdir())
        except PermissionError:
            left_out.add("a folder that may not be read", parent.relative_to(folder))
            continue
        files, folders = [], []
        for path in entries:
            is_folder = path.is_dir()
            if path.name.startswith("."):
                if is_folder or is_picture(path) or is_video(path):
                    left_out.add("hidden (its name begins with a dot)", path.relative_to(folder))
            elif is_folder:
                (links if path.is_symlink() else folders).append(path)
            else:
                files.append(path)
        waiting += reversed(folders)
        yield files


def find_pictures(places: Sequence[Path], left_out: LeftOut, without: Path | None = None) -> list[Path]:
    """The pictures and videos among files and in folders and their sub-folders, in the order of their names.

    Raises:
        UserError: a place is not there, or a folder holds none.
    """
    found = []
    for place in places:
        inside = [path for files in walk(place, left_out, without) for path in files] if place.is_dir() else []
        pictures = [place] if place.is_file() else sorted(filter(_is_shown, inside))
        for path in inside:
            if extension(path) in UNREAD_EXTENSIONS:
                left_out.add(no_decoder(path), path)
        if not pictures:
            known = ", ".join((*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS))
            raise UserError(f"pictures: {place} is no file and no folder with some to read ({known}); {left_out}")
        found += pictures
    return found


def no_decoder(path: Path) -> str:
    """Why a picture of one of UNREAD_EXTENSIONS is left out."""
    return f"of a format that is not read (.{extension(path)}): convert them to JPEG or PNG"
