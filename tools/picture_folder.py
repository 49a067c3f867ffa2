"""What a folder of pictures and videos holds: each with its caption, its fields and what else belongs to it."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path

from families.common.members import SIDE_MEMBERS
from tools.metadata import NAMES as METADATA_NAMES
from tools.metadata import NOT_IN_FOLDER, read_metadata
from tools.video_parts import WHOLE, Parts
from warpcore.data.picture_files import UNREAD_EXTENSIONS, LeftOut, extension, is_picture, is_video, no_decoder, walk
from warpcore.data.samples import NO_PICKLE, PICKLES, PICTURE_EXTENSIONS, VISUAL_EXTENSIONS

CAPTION_EXTENSIONS = ("txt", "caption")
CLASS = "cls"
"""The member with the class of a sample, as webdataset's tars have it."""
REPEATED = re.compile(r"[1-9]\d{0,2}_\S")
"""The name of a folder of kohya's scripts: how often its pictures are repeated, and what they show."""
MASKLABEL = re.compile("-masklabel$", re.IGNORECASE)
"""How OneTrainer's names of masks end: `0001-masklabel.png` is that of `0001.jpg`."""
PICTURES, CAPTIONS = "images", "metas"
"""Two folders beside each other, the second with the captions of the pictures in the first: the layout of Cosmos."""


@dataclass(frozen=True)
class Entry:
    """A picture or video of the folder, and what belongs to it."""

    key: str
    picture: Path
    companions: dict[str, Path]
    """Its files by the members that they become: "txt", "json", "mask.png", ..."""
    metadata: dict
    """Its line in a metadata file."""
    parts: Parts = WHOLE
    """What becomes of it, if it is a video."""


def find_entries(
    folder: Path,
    metadata: Path | None,
    left_out: LeftOut,
    notes: list[str],
    without: Path | None = None,
    extra: Sequence[str] = (),
    others: Sequence[str] = (),
) -> Iterator[Entry]:
    """The pictures and videos of a folder and its sub-folders, also linked ones, with what belongs to them.

    metadata: the file with captions and fields; by default those in the folder. notes: gets lines of the report on
    how the metadata, and captions in folders of their own, were read. without: a folder that is passed over. extra:
    kinds of pictures beside the pictures, such as `normal` for NAME.normal.png, besides those that are known. others:
    endings of files that the caller reads itself.
    """
    folders = list(walk(folder, left_out, without))
    read = read_metadata(folder, [path for files in folders for path in files], left_out, metadata)
    notes += read.notes() + _repeats(folders, folder) + _apart(folders, folder)
    kinds = dict(member.split(".") for member in SIDE_MEMBERS) | dict.fromkeys(extra, "png")
    named: set[Path] = set()
    keys: set[str] = set()
    for files in _with_captions_beside(folders, folder, notes):
        beside = _Folder(files, kinds)
        for picture in beside.pictures(left_out, folder):
            real = Path(realpath(picture))
            named.add(real)
            yield Entry(
                _key(picture.relative_to(folder), keys), picture, beside.take(picture), read.lines.get(real, {})
            )
        for path in beside.rest():
            if path != metadata and path.suffix not in others and (metadata or path.name not in METADATA_NAMES):
                left_out.add(_why_unused(path, kinds), path.relative_to(folder))
    for path in read.lines:
        if path not in named:
            left_out.add(NOT_IN_FOLDER, path)


def _repeats(folders: Sequence[Sequence[Path]], folder: Path) -> list[str]:
    """A note on folders whose names say how often kohya's scripts repeat what is in them, which nothing here does."""
    found = sorted({files[0].parent for files in folders if files and REPEATED.match(files[0].parent.name)})
    if not found:
        return []
    names = ", ".join(path.relative_to(folder.parent).as_posix() for path in found[:3])
    names += ", ..." if len(found) > 3 else ""
    return [
        f"folders named as for kohya's scripts, REPEATS_NAME ({names}): each picture is packed once, and the name is "
        "no caption. To draw from one more often, pack it by itself and give its tars a weight: webdataset_path: "
        "[{path: ..., weight: 10}]"
    ]


def _apart(folders: Sequence[Sequence[Path]], folder: Path) -> list[str]:
    """A note on folders of masks, as other trainers have them, which are read as pictures like all others."""
    parents = sorted({files[0].parent for files in folders if any(map(is_picture, files))})
    found = [path for path in parents if path != folder and path.name.lower() in ("mask", "masks")]
    if not found:
        return []
    names = ", ".join(path.relative_to(folder).as_posix() for path in found[:3]) + (", ..." if len(found) > 3 else "")
    return [
        f"folders named as for masks ({names}): they are packed as pictures. The mask of NAME.jpg lies beside it as "
        "NAME.mask.png"
    ]


def _with_captions_beside(
    folders: Sequence[Sequence[Path]], folder: Path, notes: list[str]
) -> Iterator[Sequence[Path]]:
    """The files of each folder, with those of `metas` among those of `images` beside it.

    notes: gets a line for each such pair.
    """
    by_parent = {files[0].parent: files for files in folders if files}
    pairs = {path: path.with_name(CAPTIONS) for path in by_parent if path.name == PICTURES}
    pairs = {pictures: captions for pictures, captions in pairs.items() if captions in by_parent}
    for pictures, captions in pairs.items():
        count = sum(extension(path) in CAPTION_EXTENSIONS for path in by_parent[captions])
        places = [path.relative_to(folder).as_posix() for path in (pictures, captions)]
        notes.append(f"captions of the pictures in {places[0]}: those of {places[1]} ({count})")
    for parent, files in by_parent.items():
        if parent not in pairs.values():
            yield [*files, *by_parent.get(pairs.get(parent), [])]


class _Folder:
    """The files of one folder, of which pictures take what belongs to them.

    kinds: of files beside a picture: `mask` -> the extension that its member has.
    """

    def __init__(self, files: Sequence[Path], kinds: Mapping[str, str]):
        self._kinds = kinds
        self._files: dict[tuple[str, str], Path] = {}
        """By the name without the last extension, and that extension in lower case."""
        self._rest = dict.fromkeys(files)
        self._composed: dict[tuple[str, str], Path] = {}
        """The same, however accents are written: macOS and others write them differently."""
        for path in sorted(files, key=lambda path: bool(MASKLABEL.search(path.stem))):  # our own names come first
            name = _plain(path.stem, kinds), extension(path)
            self._files.setdefault(name, path)
            self._composed.setdefault(_with_composed_accents(name), path)

    def pictures(self, left_out: LeftOut, folder: Path) -> Iterator[Path]:
        """One picture or video for each name; those that lie beside another, such as masks, are none."""
        by_name: dict[str, list[Path]] = defaultdict(list)
        for path in list(self._rest):
            if is_video(path) or (is_picture(path) and not side_kind(path, self._kinds)):
                by_name[path.stem].append(path)
                del self._rest[path]
        for name, found in by_name.items():
            found.sort(key=lambda path: (VISUAL_EXTENSIONS.index(extension(path)), path.name))
            for other in found[1:]:
                left_out.add(f"of the same name as another picture ({name})", other.relative_to(folder))
            yield found[0]

    def take(self, picture: Path) -> dict[str, Path]:
        """What belongs to a picture: NAME.txt or else NAME.jpg.txt, NAME.caption, ...; NAME.json, NAME.cls, ..."""
        names = (picture.stem, picture.name)
        found = {
            "txt": self._first((name, kind) for kind in CAPTION_EXTENSIONS for name in names),
            "json": self._first((name, "json") for name in names),
            CLASS: self._first((name, CLASS) for name in names),
        }
        for kind, own in self._kinds.items():
            pictures = ("png", *PICTURE_EXTENSIONS)
            found[f"{kind}.png"] = self._first((f"{picture.stem}.{kind}", one) for one in pictures)
            if own == "json":
                found[f"{kind}.json"] = self._first([(f"{picture.stem}.{kind}", "json")])
        taken = {member: path for member, path in found.items() if path}
        for path in taken.values():
            self._rest.pop(path, None)
        return taken

    def rest(self) -> Iterator[Path]:
        """Files that no picture took."""
        return iter(self._rest)

    def _first(self, names: Iterable[tuple[str, str]]) -> Path | None:
        found = (self._files.get(name) or self._composed.get(_with_composed_accents(name)) for name in names)
        return next(filter(None, found), None)


def side_kind(path: Path, kinds: Mapping[str, str]) -> str | None:
    """`mask` for NAME.mask.png: which of the `kinds` of files beside a picture it is; None for others."""
    kind = Path(_plain(path.stem, kinds)).suffix[1:]
    readable = is_picture(path) or extension(path) == "json" == kinds.get(kind)
    return kind if kind in kinds and readable else None


def _with_composed_accents(name: tuple[str, str]) -> tuple[str, str]:
    return unicodedata.normalize("NFC", name[0]), name[1]


def _plain(name: str, kinds: Mapping[str, str]) -> str:
    """A name whose kind, if it has one, is in lower case; a mask's as it is written here."""
    name = MASKLABEL.sub(".mask", name)
    base, dot, kind = name.rpartition(".")
    return f"{base}.{kind.lower()}" if dot and kind.lower() in kinds else name


def _why_unused(path: Path, kinds: Mapping[str, str]) -> str:
    if kind := side_kind(path, kinds):
        return f"a {kind} without a picture of its name, or a second one"
    if extension(path) in UNREAD_EXTENSIONS:
        return no_decoder(path)
    if extension(path) in CAPTION_EXTENSIONS:
        return "a caption without a picture, or a second one"
    if extension(path) in PICKLES:
        return NO_PICKLE
    if extension(path) in ("json", CLASS):
        return f"a .{extension(path)} without a picture, or a second one"
    return f"no picture ({path.suffix.lower() or 'no extension'})"


def _key(path: Path, used: set[str]) -> str:
    """The picture's path without its suffix, as a key of a tar: no dots in the name, and unlike all others."""
    name = path.stem.replace(".", "_")
    name = f"sample{name}" if re.fullmatch("__.*__", name) else name
    key = path.with_name(name).as_posix()
    number = 1
    while key in used:
        number += 1
        key = path.with_name(f"{name}_{number}").as_posix()
    used.add(key)
    return key
