"""The sample that a picture becomes with what belongs to it: read, checked, and in the form that readers look for."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from families.common.poses import read_people
from tools.picture_folder import CLASS, Entry
from warpcore.data.images import BadPicture, check, decode_alike, place
from warpcore.data.member_headers import picture_size
from warpcore.data.picture_files import extension
from warpcore.data.samples import FORMATS
from warpcore.files import NotAFileError, read_bytes
from warpcore.safe_json import ExcessiveJsonError, parse_json
from warpcore.text import EncodingError, decode_text, is_whole

_LOOKED_AT = 64, 64
"""(H, W) in px at which masks and their kind are looked at, only to see that they can be."""


class Unusable(Exception):
    """Why a picture is left out."""


Outcome = tuple[tuple[int, int], dict[str, bytes]] | Unusable
"""(width, height) in px and the members of a sample, or why it is left out."""


def load_sample(entry: Entry) -> Outcome:
    """(width, height) in px and the members of a sample, each checked, or why it is left out."""
    try:
        content = _read(entry.picture)
        size = _check_picture(content)
        members = {extension(entry.picture): content, **_description(entry), **_beside(entry, size)}
    except Unusable as reason:
        return reason
    return size, members


def load_again(entry: Entry) -> Outcome:
    """The same of a picture that was checked before, which is not decoded once more."""
    try:
        content = _read(entry.picture)
        size = picture_size(io.BytesIO(content))
        return size, {extension(entry.picture): content, **_description(entry), **_beside(entry, size)}
    except Unusable as reason:
        return reason


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
