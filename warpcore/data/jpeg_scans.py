"""What the markers of a JPEG say before it is decoded: how many scans there are, and whether they can be all of it."""

import re
import struct
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin

START_OF_SCAN, END = b"\xff\xda", b"\xff\xd9"
# In a scan's data 0xff is followed by 0, or by a restart marker (0xd0 to 0xd7); 0xff may also fill up before a marker.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MAX_SEGMENTS = 10_000
"""Of tables, comments and scans; extended metadata come in segments of 64 kB."""
_ARITHMETIC = b"\xff\xc9", b"\xff\xca"
_BLOCK_PIXELS = 64
_FILLING = b"".join(b"\x55\xaa" * 64 + bytes([0xFF, 0xD0 + number % 8]) for number in range(16))
"""Data of any picture. With all restart markers: after a wrong one libjpeg reads on from the right one."""
GREY = 127, 128
"""What libjpeg makes of each band where there is no data; CMYK may be stored inverted."""


class Scan(NamedTuple):
    """ISO/IEC 10918-1, B.2.3: the coefficients `first` to `last` of some components, down to bit `lowest_bit`."""

    components: bytes
    first: int
    last: int
    lowest_bit: int


class Scans(NamedTuple):
    """The scans of a picture."""

    found: list[Scan]
    last: int
    """Where the marker of the last one is."""
    size: int
    """Bytes of all at most, with markers and tables."""
    arithmetic: bool
    """Not Huffman coded."""


def blocks(header: JpegImagePlugin.JpegImageFile) -> float:
    """Blocks of 8 x 8 coefficients that the picture consists of, at least."""
    factors = [(h, v) for _, h, v, _ in header.layer]
    if not factors or not all(h and v for h, v in factors):
        raise ValueError("the JPEG's header is damaged")
    finest = max(h for h, _ in factors) * max(v for _, v in factors)
    return header.width * header.height / _BLOCK_PIXELS * sum(h * v for h, v in factors) / finest


def scans(data: bytes, header: JpegImagePlugin.JpegImageFile) -> Scans:
    """The scans that are decoded. Raises ValueError where there is no end marker, or too much before it."""
    found, start, last, arithmetic, segments = [], 0, 0, False, 0
    marker = _MARKER.search(data, 2)
    try:
        while marker[0] != END:
            at, segments = marker.start(), segments + 1
            if segments > _MAX_SEGMENTS:
                break
            (size,) = struct.unpack_from(">H", data, at + 2)
            arithmetic = arithmetic or marker[0] in _ARITHMETIC
            if marker[0] == START_OF_SCAN:
                start, last = start or at, at
                count = data[at + 4]
                first, last, bits = data[at + 5 + 2 * count : at + 8 + 2 * count]
                found.append(Scan(data[at + 5 : at + 5 + 2 * count : 2], first, last, bits & 15))
                if "progressive" not in header.info and count == len(header.layer):
                    # libjpeg reads no other scan. The search from behind is a hundred times faster.
                    return Scans(found, at, data.rindex(END, at + 2 + size) - at, arithmetic)
            marker = _MARKER.search(data, at + 2 + size)
    except (struct.error, ValueError, IndexError, TypeError):  # there is no marker, or less than it announces
        raise ValueError("the JPEG is cut off: it has no end marker") from None
    if segments > _MAX_SEGMENTS:
        raise ValueError(f"the JPEG consists of more than {_MAX_SEGMENTS:,} segments")
    return Scans(found, last, marker.start() - start, arithmetic)


def are_complete(found: list[Scan], header: JpegImagePlugin.JpegImageFile) -> bool:
    """Whether the scans hold every component and, of a progressive JPEG, the whole of the first one.

    That is what encoders write last. They may leave out coefficients of colours that are all zero.
    """
    if "progressive" not in header.info:
        return {layer[0] for layer in header.layer} <= {one for scan in found for one in scan.components}
    missing_bits = {layer[0]: [1] * _BLOCK_PIXELS for layer in header.layer}
    for scan in found:
        for component in scan.components:
            if component in missing_bits:
                numbers = slice(scan.first, min(scan.last + 1, _BLOCK_PIXELS))
                missing_bits[component][numbers] = [scan.lowest_bit] * len(missing_bits[component][numbers])
    return not any(missing_bits[header.layer[0][0]]) and not any(bits[0] for bits in missing_bits.values())


def check(data: bytes, header: JpegImagePlugin.JpegImageFile) -> Scans:
    """The scans of an opened JPEG. Raises ValueError if the file can't hold all of it."""
    told = scans(data, header)
    # A block of a progressive JPEG takes a bit or more (one code of the later scans may stand for 32,767 blocks), any
    # other one two. Arithmetic coding has no such bound.
    bits = 0 if told.arithmetic else 1 if "progressive" in header.info else 2
    if told.size < blocks(header) * bits / 8:
        raise ValueError(
            f"the JPEG is damaged: its data is too short for its size ({told.size:,} bytes for "
            f"{header.width} x {header.height} px)"
        )
    if not are_complete(told.found, header):
        raise ValueError("the JPEG is cut off: some of its scans are missing")
    return told


def ran_out(data: bytes, scans: Scans) -> bool:
    """Whether a JPEG has less data than its picture.

    Of the rest libjpeg makes grey rows. What tells them from a picture's own: data before the end marker changes them.
    """
    end = data.index(END, scans.last)  # 0xff in a scan's data is followed by 0
    small, other = (_in_eighths(one) for one in (data, data[:end] + _FILLING + data[end:]))
    return not np.array_equal(small, other)


def _in_eighths(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data), formats=("JPEG",)) as picture:
        picture.draft(picture.mode, (max(1, picture.width // 8), max(1, picture.height // 8)))
        return np.array(picture)
