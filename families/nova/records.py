"""Folders of records, the published form of NOVA's caches: moments of an autoencoder, captions, motion.

METADATA is JSON: `entries`, `features` (their types), `version`. Each NAME.index has lines "offset size", and
NAME.data the records themselves, back to back: messages of Protocol Buffers, whose types METADATA repeats. Nothing
that such a folder says is believed before it is checked, and no more of it is held than one record.
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.safe_json import read_object
from warpcore.text import brief

METADATA = "METADATA"
MAX_RECORD_BYTES = 2**28
"""The moments of a clip of a minute have a tenth of it."""
MAX_LINE_BYTES = 64
"""Of an index: two numbers."""
MAX_AXES = 8
VARINT, FIXED_64, LENGTH, FIXED_32 = 0, 1, 2, 5
"""Wire types of Protocol Buffers."""
KINDS = {"BYTES": (1, LENGTH), "STRING": (1, LENGTH), "FLOAT32": (2, FIXED_32), "INT64": (3, VARINT)}
"""The field of a feature that holds each type, and how it is written."""
LIST, MAP = (4, LENGTH), (5, LENGTH)

Kind = str | list | dict
Record = dict[str, Any]


class _BrokenRecordError(ValueError):
    """The message goes on behind "it"."""


def read_records(folder: Path) -> Iterator[Record]:
    """The records of a folder, one by one: by the names of their features bytes, texts, numbers, lists and mappings.

    Raises:
        UserError: the folder is damaged, cut off or of another kind; the message names the file and the record.
    """
    try:
        about = read_object(folder / METADATA, str(folder / METADATA))
    except OSError as error:
        raise UserError(f"{folder} is no folder of records: {error}") from None
    entries, kinds = _checked(about, folder / METADATA)
    seen = 0
    for index in sorted(folder.glob("*.index")):
        for number, content in enumerate(_contents(index)):
            try:
                yield _mapping(content, kinds)
            except _BrokenRecordError as error:
                raise UserError(f"record {number} of {index.with_suffix('.data')} is damaged: it {error}") from None
            seen += 1
    if seen != entries:
        raise UserError(
            f"{folder} holds {seen} records, but {METADATA} says {entries}: it was cut off while it was written or "
            "copied; copy it from scratch"
        )


def _checked(about: Mapping[str, Any], path: Path) -> tuple[int, dict[str, Kind]]:
    entries, kinds, version = (about.get(key) for key in ("entries", "features", "version"))
    if version != 1 or not isinstance(entries, int) or not isinstance(kinds, dict) or not _known(kinds):
        raise UserError(
            f"{path} is not that of a folder of records: it needs entries (a number), features (types such as BYTES, "
            f"STRING, FLOAT32, INT64, [INT64]) and version 1, and holds {brief(about)}"
        )
    return entries, kinds


def _known(kind: Kind) -> bool:
    if isinstance(kind, dict):
        return all(map(_known, kind.values()))
    if isinstance(kind, list):
        return len(kind) == 1 and _known(kind[0])
    return kind in KINDS if isinstance(kind, str) else False


def _contents(index: Path) -> Iterator[bytes]:
    """The messages that an index stands for. Raises UserError where both don't agree to the byte."""
    path = index.with_suffix(".data")
    try:
        data, lines = open_to_read(path), open_to_read(index)
    except OSError as error:
        raise UserError(f"{index} and {path.name} belong together: {error}") from None
    with data, lines:
        there, end = os.fstat(data.fileno()).st_size, 0
        for offset, size in _places(lines, index):
            if offset != end or size > MAX_RECORD_BYTES:
                raise UserError(
                    f"{index} is damaged: a record at {offset} of {size} bytes, where one of up to "
                    f"{MAX_RECORD_BYTES:,} bytes at {end} has to follow"
                )
            end = offset + size
            if end > there:
                raise UserError(
                    f"{path} is cut off: it has {there} bytes, and {index.name} a record that ends at {end}"
                )
            yield data.read(size)
        if end != there:
            raise UserError(f"{index} is cut off: its records end at {end}, but {path.name} has {there} bytes")


def _places(lines: BinaryIO, index: Path) -> Iterator[tuple[int, int]]:
    while line := lines.readline(MAX_LINE_BYTES):
        match = re.fullmatch(rb"(\d{1,18}) (\d{1,18})\r?\n?", line)
        if match is None:
            raise UserError(f"{index} is no index: {brief(line.decode('latin-1'))} is not an offset and a size")
        yield int(match[1]), int(match[2])


def _fields(content: bytes) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of each field of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(content, at)
        else:
            size = {FIXED_32: 4, FIXED_64: 8}.get(wire)
            if wire == LENGTH:
                size, at = _varint(content, at)
            if size is None or at + size > len(content):
                raise _BrokenRecordError("is cut off" if size is not None else "is no message of Protocol Buffers")
            value, at = content[at : at + size], at + size
        yield number, wire, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise _BrokenRecordError("is cut off")
        byte, at = content[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise _BrokenRecordError("is no message of Protocol Buffers")


def _mapping(content: bytes, kinds: Mapping[str, Kind]) -> Record:
    """The features of a message, which have to be those of `kinds`."""
    found: Record = {}
    for number, wire, entry in _fields(content):
        if (number, wire) != (1, LENGTH):
            raise _BrokenRecordError("is no mapping of features")
        parts = {part: value for part, kind, value in _fields(entry) if kind == LENGTH}
        name = _text(parts.get(1, b""))
        if name not in kinds:
            raise _BrokenRecordError(f"has {brief(name)}, of which {METADATA} knows nothing")
        found[name] = _feature(parts.get(2, b""), kinds[name], name)
    if missing := [name for name in kinds if name not in found]:
        raise _BrokenRecordError(f"lacks {', '.join(missing)}")
    return {name: found[name] for name in kinds}


def _feature(content: bytes, kind: Kind, name: str) -> Any:
    wanted = LIST if isinstance(kind, list) else MAP if isinstance(kind, dict) else KINDS[kind]
    if isinstance(kind, list) and not content:  # so an empty list is written
        return []
    found = [((number, wire), value) for number, wire, value in _fields(content)]
    if len(found) != 1 or found[0][0] != wanted:
        raise _BrokenRecordError(f"holds {name} of another type than {METADATA} says, {kind}")
    value = found[0][1]
    if isinstance(kind, dict):
        return _mapping(value, kind)
    if isinstance(kind, list):
        parts = list(_fields(value))
        if any((number, wire) != (1, LENGTH) for number, wire, _ in parts):
            raise _BrokenRecordError(f"holds {name}, which is no list")
        return [_feature(part, kind[0], name) for _, _, part in parts]
    if kind == "STRING":
        return _text(value)
    if kind == "FLOAT32":
        return struct.unpack("<f", value)[0]
    return value if kind == "BYTES" else value - 2**64 * (value >> 63)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _BrokenRecordError("holds a text that is not UTF-8") from None


def array_of(content: bytes, shape: list[int], what: str) -> np.ndarray:
    """The array of float16 numbers that a record holds with its shape.

    Raises:
        ValueError: the shape is of another number of bytes, or numbers are not finite; the message begins with `what`.
    """
    if len(shape) > MAX_AXES or any(side < 0 for side in shape):
        raise ValueError(f"{what} of shape {brief(shape)}, which no array has")
    sides = 1 if shape else 0
    for side in shape:
        sides *= side
    if 2 * sides != len(content):
        raise ValueError(f"{what} of shape {shape} would have {2 * sides} bytes, and there are {len(content)}")
    values = np.frombuffer(content, "<f2").reshape(shape or (0,))
    if not np.isfinite(values).all():
        raise ValueError(f"{what} hold numbers that are not finite")
    return values
