"""The samples that a picture or video becomes, with what belongs to it: read, checked, and as readers look for it."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from families.common.poses import read_people
from tools.picture_folder import CLASS, Entry
from tools.video_parts import CUTS, Part, cut_out, pictures_of
from warpcore.data.images import BadPicture, check, decode_alike, place
from warpcore.data.member_headers import picture_size
from warpcore.data.picture_files import extension, is_video
from warpcore.data.samples import FORMATS
from warpcore.data.video_headers import read_header
from warpcore.files import NotAFileError, read_bytes
from warpcore.safe_json import ExcessiveJsonError, parse_json
from warpcore.text import EncodingError, decode_text, is_whole

_LOOKED_AT = 64, 64
"""(H, W) in px at which masks and their kind are looked at, only to see that they can be."""


class Unusable(Exception):
    """Why a picture or video is left out."""


Outcome = tuple[tuple[int, int], dict[str, bytes]] | Unusable
"""(width, height) in px and the members of a sample, or why it is left out."""


def load_samples(entry: Entry) -> Iterable[tuple[str, Outcome]]:
    """Key and outcome of each sample that a picture or video becomes: one, or the parts of a video."""
    if is_video(entry.picture):
        return _of_video(entry)
    try:
        content = _read(entry.picture)
        return [(entry.key, _whole(entry, content, _check_picture(content)))]
    except Unusable as reason:
        return [(entry.key, reason)]


def load_samples_again(entry: Entry) -> Iterable[tuple[str, Outcome]]:
    """The same of what was checked before: a picture is not decoded once more."""
    return _of_video(entry) if is_video(entry.picture) else [(entry.key, load_again(entry))]


def load_again(entry: Entry) -> Outcome:
    """The sample of a picture that was checked before, which is not decoded once more."""
    if is_video(entry.picture):
        return Unusable("a video")
    try:
        content = _read(entry.picture)
        return _whole(entry, content, picture_size(io.BytesIO(content)))
    except Unusable as reason:
        return reason


def _whole(entry: Entry, content: bytes, size: tuple[int, int]) -> Outcome:
    """The sample of a picture or a whole video of `size` (width, height)."""
    return size, {extension(entry.picture): content, **_description(entry), **_beside(entry, size)}


def _of_video(entry: Entry) -> Iterable[tuple[str, Outcome]]:
    try:
        content = _read(entry.picture)
        header = read_header(io.BytesIO(content))
        described = _description(entry)
        fields = parse_json(described["json"]) if "json" in described else {}
        given = fields.pop(CUTS, None) if isinstance(fields, dict) else None
        cuts = entry.parts.cuts(header, given)
        if entry.parts.frames_every:  # one after the other: together they may fill the memory
            parts = pictures_of(content, header, entry.parts.frames_every)
        elif cuts is None:
            return [(entry.key, _whole(entry, content, (header.width, header.height)))]
        else:
            parts = [cut_out(content, header, *cut) or Unusable("a cut that shows no frame") for cut in cuts]
            if given is None:  # a piece of a fixed length may well show none, where the frame before is shown on
                parts = [part for part in parts if isinstance(part, Part)]
        about = {**described, **_beside(entry, (header.width, header.height))}
        return _parts(entry.key, parts, about, fields if isinstance(fields, dict) else {})
    except BadPicture as error:
        return [(entry.key, _unreadable(error))]
    except Unusable as reason:
        return [(entry.key, reason)]


def _unreadable(error: BadPicture) -> Unusable:
    """Of a video: without what differs from file to file."""
    return Unusable(f"unreadable ({re.split('[:;]', _reason(error))[0]})")


def _parts(
    key: str, parts: Iterable[Part | Unusable], about: dict[str, bytes], fields: dict
) -> Iterator[tuple[str, Outcome]]:
    """Samples of the parts of a video, each with what belongs to all of it, and where in it the part is."""
    names = (f"{key}__{number:04d}" for number in count(1))
    try:
        for part in parts:
            if isinstance(part, Unusable):
                yield next(names), part
            else:
                members = {part.extension: part.content, **about, "json": _json(fields | part.fields)}
                yield next(names), (part.size, members)
    except BadPicture as error:
        yield next(names), _unreadable(error)


def _read(path: Path) -> bytes:
    if not path.exists():
        raise Unusable("a link that leads nowhere")
    try:
        return read_bytes(path)
    except NotAFileError:
        raise Unusable("no regular file") from None


def _check_picture(content: bytes) -> tuple[int, int]:
    """(width, height) in px of a picture that can be decoded to its end."""
    if not content:
        raise Unusable("empty file")
    try:
        return check(content)[::-1]
    except BadPicture as error:
        raise Unusable(f"unreadable ({_reason(error)})") from None


def _description(entry: Entry) -> dict[str, bytes]:
    """The .txt and .json of a sample from its own files and, for what they lack, from its metadata line; its .cls."""
    metadata = dict(entry.metadata)
    caption = metadata.pop("text", None)
    members = {}
    if "txt" in entry.companions:
        caption = _text(entry.companions["txt"], "caption")
    if caption is not None:
        if not is_whole(caption):
            raise Unusable("caption holds the character zero or half a character (a surrogate)")
        members["txt"] = caption.encode()
    try:
        if "json" in entry.companions:
            text = _text(entry.companions["json"], ".json")
            fields = parse_json(text)
            merge = metadata and isinstance(fields, dict)
            members["json"] = _json(metadata | fields) if merge else text.encode()
        elif metadata:
            members["json"] = _json(metadata)
    except ExcessiveJsonError as error:
        raise Unusable(str(error).replace("it", ".json", 1)) from None
    except RecursionError:  # of columns that a .parquet nests
        raise Unusable(".json is nested too deeply") from None
    except ValueError:
        raise Unusable(".json is not JSON") from None
    if CLASS in entry.companions:
        members[CLASS] = _text(entry.companions[CLASS], ".cls").strip().encode()
    return members


def _json(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, ensure_ascii=False, default=str)
    return (text if is_whole(text) else json.dumps(fields, default=str)).encode()  # half a character as an escape


def _text(path: Path, what: str) -> str:
    try:
        return decode_text(_read(path), path)
    except EncodingError:
        raise Unusable(f"{what} is not UTF-8") from None


def _beside(entry: Entry, size: tuple[int, int]) -> dict[str, bytes]:
    """The masks, depth maps, poses, ... of a sample, whose picture is of `size` (width, height)."""
    members = {}
    for member, path in sorted(entry.companions.items()):
        if member in ("txt", "json", CLASS):
            continue
        content = _read(path)
        try:
            if member.endswith(".json"):
                read_people(content, size[::-1])
            else:
                decode_alike(content, place(size[::-1], _LOOKED_AT))
                content = content if extension(path) == "png" else _as_png(content)
        except (BadPicture, ValueError) as error:
            raise Unusable(f"its .{member} can't be used ({_reason(error)})") from None
        members[member] = content
    return members


def _as_png(content: bytes) -> bytes:
    """The same pixels as a PNG, which is what readers look for."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        upright = upright if upright.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA") else upright.convert("RGB")
        png = io.BytesIO()
        upright.save(png, "PNG", exif=b"")
    return png.getvalue()


def _reason(error: Exception) -> str:
    """Why something can't be read, without what differs from file to file."""
    return re.split(r"[<(]|\d+ x", str(error))[0].strip(" :") or type(error).__name__
