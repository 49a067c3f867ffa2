"""What it takes to decode a picture, judged from its header: few bytes may claim many pixels."""

import struct
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from warpcore.data import jpeg_scans
from warpcore.data.jpeg_scans import Scan

MAX_PIXELS = 2**27  # 134 MP: above what cameras make, and 400 MB once decoded
MAX_BYTES = 2**30
"""Memory that decoding a picture may take, or `_BYTES_OF_A_PIXEL` for each pixel that it may have if that's more."""
_BYTES_OF_A_PIXEL = 5
_MAX_SCANS = 16
"""A progressive JPEG has about 10 scans, each of which takes time for all pixels."""
_RGB_BYTES = 3
_COEFFICIENT_BYTES = 2 * 64
"""Per block. Of a JPEG of several scans libjpeg keeps all blocks."""
_DECODER_BYTES = {"WEBP": 12, "QOI": 12, "AVIF": 12, "JPEG2000": 20}
"""Per pixel, of decoders that keep more than the picture that Pillow makes."""
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Per pixel in Pillow; 4 in other modes."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
MAX_SECONDS = 5
"""Processor time that decoding a picture may take, estimated from its header and its number of bytes."""
_CODEC_COSTS = {
    "qoi": (12, 1000, 1),
    "ppm": (0, 600, 6),
    "ppm_plain": (0, 250, 18),
    "bmp_rle": (90, 220, 3),
    "jpeg2k": (31, 170, 6),
}
"""Nanoseconds per pixel and per byte, and the most bytes of a pixel that count, of Pillow's slow decoders: all but the
last are written in Python. As measured on one core of a server; other decoders take at most 65 ns per pixel."""
_TILE_SECONDS, _TILE_PIXEL_SECONDS = 20e-6, 5e-9
"""Of the tiles or strips of a TIFF, which may lie over one another."""
_MAX_NUMBERS = int(MAX_SECONDS / _TILE_SECONDS)
"""Of a tag of a TIFF, as of the places of its strips."""
MAX_READS = 2**19
"""Of a picture's bytes by Pillow, each about a microsecond: a few for every part that a file consists of."""
_UNPACKED_CHUNKS, _UNPACKING_READS = (b"iCCP", b"iTXt", b"zTXt"), 2000
"""Chunks of a PNG that Pillow unpacks to a megabyte at most, and how many reads take as long."""
MAX_EXIF_BYTES = 2**22
"""Cameras write 64 kB at most. Pillow lists the numbers of a tag, each in up to 40 bytes."""
_EXIF_PLACES = ("exif", "Raw profile type exif")
_TIFF_STARTS = (b"II", b"MM")
_BIG_TIFF = 43
_CHEAP_TYPES = (1, 2, 7)
"""Bytes, text and undefined, which stay as they are."""


class BadPicture(Exception):
    """The bytes are no picture that can be read; the message says why."""


class CountedFile:
    """A picture's file whose reads are counted: a file may consist of millions of parts, each of a few bytes."""

    def __init__(self, file: BinaryIO):
        self._file, self._reads_left = file, MAX_READS

    def read(self, size: int = -1) -> bytes:
        """Raises BadPicture after too many calls."""
        data = self._file.read(size)
        self._reads_left -= _UNPACKING_READS if size == 8 and data[4:] in _UNPACKED_CHUNKS else 1
        if self._reads_left < 0:
            raise BadPicture("it consists of too many parts; save it again, as PNG or JPEG")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_tags(file: BinaryIO) -> None:
    """Raises BadPicture for a TIFF with more numbers in a tag than it may have strips.

    Pillow lists them as it opens the file, in 4 microseconds and 300 bytes each. The tags are found as Pillow finds
    them, and the file is left at its start.
    """
    start = file.read(16).ljust(16, b"\0")
    if start[:2] in _TIFF_STARTS and {42, _BIG_TIFF} & set(start[2:4]):
        order, is_big = "<>"[start[:2] == b"MM"], start[2] == _BIG_TIFF
        entry = struct.Struct(order + ("HHQ8x" if is_big else "HHL4x"))
        number = struct.Struct(order + ("Q" if is_big else "H"))
        file.seek(struct.unpack(order + "Q", start[8:])[0] if is_big else struct.unpack(order + "L", start[4:8])[0])
        (num_tags,) = number.unpack(file.read(number.size).ljust(number.size, b"\0"))
        tags = file.read(entry.size * min(num_tags, 2**16))
        for tag, kind, count in entry.iter_unpack(tags[: len(tags) // entry.size * entry.size]):
            if count > _MAX_NUMBERS and kind not in _CHEAP_TYPES:
                raise BadPicture(
                    f"it takes too long to open (a TIFF with {count:,} numbers in its tag {tag}, the limit is "
                    f"{_MAX_NUMBERS:,}); save it as PNG or JPEG"
                )
    file.seek(0)


def orientation(picture: Image.Image) -> int:
    """How EXIF says an opened picture is turned: 1 to 8. Raises BadPicture where there is far too much of it."""
    if any(len(picture.info.get(place, b"")) > MAX_EXIF_BYTES for place in _EXIF_PLACES):
        raise BadPicture(f"it has more than {MAX_EXIF_BYTES >> 20} MiB of EXIF; save it again without")
    found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)  # that of PNG files decodes the whole picture
    return found if found in range(1, 9) else 1


def check_pixels(picture: Image.Image, max_pixels: int) -> None:
    """Raises BadPicture for a larger one."""
    if picture.width * picture.height > max_pixels:
        raise BadPicture(f"it has more than the limit of {max_pixels} pixels ({picture.width} x {picture.height} px)")


def check_memory(picture: Image.Image, max_pixels: int, scans: list[Scan] | None = None, reduction: int = 1) -> None:
    """Raises BadPicture if decoding an opened picture, of a JPEG's `scans` at 1/`reduction`, takes too much."""
    pixels = picture.width * picture.height
    if picture.format == "TIFF":
        pixels = max(pixels, _tile_pixels(picture))
    stored = _DECODER_BYTES.get(picture.format, 0) + _MODE_BYTES.get(picture.mode, 4)
    needed = pixels * (stored + _RGB_BYTES)
    if scans is not None:
        whole = picture.mode not in ("L", "RGB")  # by Pillow
        needed = pixels * (4 + _RGB_BYTES if whole else _RGB_BYTES / reduction**2)
        if "progressive" in picture.info or len(scans) > 1:
            needed += jpeg_scans.blocks(picture) * _COEFFICIENT_BYTES
        if len(scans) * pixels > _MAX_SCANS * max(MAX_PIXELS, max_pixels):
            raise BadPicture(
                f"it takes too long to decode (a JPEG of {picture.width} x {picture.height} px in {len(scans)} scans)"
            )
    limit = max(MAX_BYTES, _BYTES_OF_A_PIXEL * max_pixels)
    if needed > limit:
        raise BadPicture(
            f"it takes too much memory to decode (a {picture.format} of {picture.width} x {picture.height} px: "
            f"{needed / 1e6:,.0f} MB, the limit is {limit / 1e6:,.0f} MB)"
        )


def check_time(picture: Image.Image, num_bytes: int) -> None:
    """Raises BadPicture if decoding an opened picture of a file of `num_bytes` takes too long."""
    pixels, tiles = picture.width * picture.height, picture.tile
    codec = tiles[0][0] if tiles else None
    per_pixel, per_byte, most_bytes = _CODEC_COSTS.get(codec, (0, 0, 0))
    needed = 1e-9 * (per_pixel * pixels + per_byte * min(num_bytes, most_bytes * pixels))
    if picture.format == "TIFF" and len(tiles) > 1:
        needed += _TILE_SECONDS * len(tiles)
        needed += _TILE_PIXEL_SECONDS * sum((right - left) * (low - top) for _, (left, top, right, low), *_ in tiles)
    if needed > MAX_SECONDS:
        parts = f" in {len(tiles)} parts" if len(tiles) > 1 else ""
        raise BadPicture(
            f"it takes too long to decode (a {picture.format} of {picture.width} x {picture.height} px{parts}: about "
            f"{needed:.0f} s, the limit is {MAX_SECONDS} s); save it as PNG or JPEG"
        )


def _tile_pixels(picture: Image.Image) -> int:
    width, height = (picture.tag_v2.get(tag) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    return width * height if isinstance(width, int) and isinstance(height, int) else 0
