"""The boxes of an MP4 or MOV file (ISO/IEC 14496-12) that say which frames its first video track shows, and when.

Bounded: the header is at most MAX_MOOV_BYTES, its boxes are looked up along one path, and no table is longer than
the bytes that hold it, or than the frames that a video may have.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from warpcore.data import h264_shape, hevc_shape

MAX_MOOV_BYTES = 64 << 20
"""A video of 2**19 frames needs about 15 MB, and its sound as much."""
MAX_TOP_BOXES = 4096
"""Before `moov`."""
MAX_BOXES = 256
"""Inside of one box of the header."""
MAX_EDITS = 256
"""Parts of an edit list; cameras and editors write one or two."""
_FOREVER = 2**62
_CODECS = {
    "avc1": "h264", "avc3": "h264", "hvc1": "hevc", "hev1": "hevc", "dvh1": "hevc", "dvhe": "hevc", "av01": "av1",
    "vp08": "vp8", "vp09": "vp9", "mp4v": "mpeg4", "s263": "h263", "jpeg": "mjpeg", "mjpa": "mjpeg",
    "apcn": "prores", "apch": "prores", "apcs": "prores", "apco": "prores", "ap4h": "prores", "ap4x": "prores",
}  # fmt: skip
"""FFmpeg's names of codecs by the types of sample entries."""
_ENTRY_BYTES = 86
"""Of a video's sample entry, before the boxes in it."""


class BadBoxes(Exception):
    """What is wrong with a file's boxes."""


@dataclass(frozen=True, slots=True)
class Mp4Track:
    """A video track."""

    width: int
    height: int
    """In px as coded."""
    codec: str
    """As FFmpeg calls it, or the type of its sample entry."""
    pixel_shape: float = 1.0
    """The width of a pixel by its height."""
    rotation: int = 0
    """0, 90, 180 or 270 degrees, clockwise, by which frames are turned to be shown."""
    times: np.ndarray | None = None
    """(N,) int64 ticks at which the N frames are shown, in the order of decoding; None where the header doesn't say
    it, as in a fragmented file."""
    tick_of_last: int = 0
    """How long the last frame is shown, in ticks."""
    timescale: int = 1
    """Ticks per second."""


def read_track(file: BinaryIO, file_bytes: int, max_frames: int) -> Mp4Track:
    """The first video track.

    Raises:
        BadBoxes: there is none, it promises more than `max_frames` or more than the file holds, or it is damaged.
    """
    moov = _moov(file, file_bytes)
    tracks = [dict(_boxes(content)) for kind, content in _boxes(moov) if kind == b"trak"]
    medias = [dict(_boxes(_of(track, b"mdia"))) for track in tracks]
    found = [number for number, media in enumerate(medias) if bytes(_of(media, b"hdlr")[8:12]) == b"vide"]
    if not found:
        raise BadBoxes("it has no video stream")
    track, media = tracks[found[0]], medias[found[0]]
    tables = dict(_boxes(_of(dict(_boxes(_of(media, b"minf"))), b"stbl")))
    header, in_movie = _of(track, b"tkhd"), dict(_boxes(moov))
    width, height, codec, pixel_shape = _entry(_of(tables, b"stsd"), header)
    movie = _of(in_movie, b"mvhd")
    rotation = (_rotation(header, 40) + _rotation(movie, 36)) % 360
    timescale, movie_scale = _timescale(_of(media, b"mdhd")), _timescale(movie)
    if b"mvex" in in_movie or b"stz2" in tables:
        return Mp4Track(width, height, codec, pixel_shape, rotation)
    times, tick_of_last = _times(tables, file_bytes, max_frames)
    edits = dict(_boxes(track[b"edts"])).get(b"elst") if b"edts" in track else None
    if edits is not None:
        times = _shown(times, edits, timescale, movie_scale)
    return Mp4Track(width, height, codec, pixel_shape, rotation, times, tick_of_last, timescale)


# ------------------------------------------------------------------ boxes


def _moov(file: BinaryIO, file_bytes: int) -> memoryview:
    """The content of the box that describes all others."""
    place = 0
    for _ in range(MAX_TOP_BOXES):
        if place + 8 > file_bytes:
            raise BadBoxes("it is cut short, or damaged: it has no moov box, which says what is where")
        file.seek(place)
        size, kind = struct.unpack(">I4s", _read(file, 8))
        start = place + 8
        if size == 1:
            size, start = struct.unpack(">Q", _read(file, 8))[0], place + 16
        end = place + size if size else file_bytes
        if end < start:
            raise BadBoxes(f"it is damaged: a box of {size} bytes at byte {place}")
        if kind == b"moov":
            if end > file_bytes:
                raise BadBoxes(f"it is cut short: it has {file_bytes:,} bytes, and its moov box ends at {end:,}")
            if end - start > MAX_MOOV_BYTES:
                raise BadBoxes(f"its moov box has {end - start:,} bytes; the limit is {MAX_MOOV_BYTES:,}")
            return memoryview(_read(file, end - start))
        if end > file_bytes:
            raise BadBoxes(f"it is cut short: it has {file_bytes:,} bytes, and needs {end:,} before its moov box")
        place = end
    raise BadBoxes(f"it is damaged: no moov box among the first {MAX_TOP_BOXES}")


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise BadBoxes("it is cut short inside of a box")
    return content


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Type and content of the boxes inside of one; ends where they do, or at zeros."""
    place = 0
    for _ in range(MAX_BOXES):
        if place + 8 > len(content):
            return
        size, kind = struct.unpack_from(">I4s", content, place)
        start = place + 8
        if size == 1 and place + 16 <= len(content):
            size, start = struct.unpack_from(">Q", content, place + 8)[0], place + 16
        end = place + size if size else len(content)
        if kind == b"\0\0\0\0":
            return
        if not start <= end <= len(content):
            raise BadBoxes(f"it is damaged: its box {kind!r} does not fit into the one around it")
        yield kind, content[start:end]
        place = end
    raise BadBoxes(f"it is damaged: more than {MAX_BOXES} boxes inside of one")


def _of(boxes: dict[bytes, memoryview], kind: bytes) -> memoryview:
    if kind not in boxes:
        raise BadBoxes(f"it is damaged: it has no box {kind.decode()}")
    return boxes[kind]


def _unpack(form: str, content: memoryview, place: int) -> tuple:
    try:
        return struct.unpack_from(">" + form, content, place)
    except struct.error:
        raise BadBoxes("it is damaged: a box of its header is too short") from None


def _table(content: memoryview, kind: str, place: int = 4) -> np.ndarray:
    """The entries of a table, whose number stands at `place`; `kind` of each column: "u4,u4"."""
    form = np.dtype([(f"f{number}", f">{one}") for number, one in enumerate(kind.split(","))])
    (count,) = _unpack("I", content, place)
    entries = content[place + 4 :]
    if count * form.itemsize > len(entries):
        raise BadBoxes(f"it is damaged: a table of {count:,} entries in {len(entries):,} bytes")
    return np.frombuffer(entries, form, count)


# ------------------------------------------------------------------ what they say


def _entry(stsd: memoryview, tkhd: memoryview) -> tuple[int, int, str, float]:
    """Coded width, height, codec and shape of pixels."""
    size, kind = _unpack("I4s", stsd, 8)
    width, height = _unpack("HH", stsd, 8 + 32)
    codec = kind.decode("ascii", "backslashreplace").strip()
    if codec == "encv":
        raise BadBoxes("it is encrypted")
    inner = dict(_boxes(stsd[8 + _ENTRY_BYTES : 8 + size]))
    if b"pasp" in inner:
        wide, high = _unpack("II", inner[b"pasp"], 0)
    else:
        wide, high = 1, 1
        shown_width, shown_height = _unpack("II", tkhd, 76 + _later(tkhd))  # 16.16 fixed point
        if shown_width and shown_height and width and height:
            wide, high = shown_width * height, shown_height * width
        for box, own in ((b"avcC", h264_shape), (b"hvcC", hevc_shape)):
            if wide == high and box in inner:
                wide, high = own.pixel_shape(bytes(inner[box]))
    return width, height, _CODECS.get(codec, codec), wide / high if wide and high else 1.0


def _rotation(header: memoryview, before: int) -> int:
    """Degrees clockwise of the matrix in a header, `before` bytes after its start in version 0."""
    a, b = _unpack("ii", header, before + _later(header))
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360 if a or b else 0


def _later(header: memoryview) -> int:
    """By how many bytes what follows a header's times comes later: in version 1, three of them have 8 bytes, not 4."""
    return 12 if header[:1] == b"\1" else 0


def _timescale(header: memoryview) -> int:
    (scale,) = _unpack("I", header, 20 if header[:1] == b"\1" else 12)
    if not scale:
        raise BadBoxes("it is damaged: a clock of 0 ticks per second")
    return scale


def _times(tables: dict[bytes, memoryview], file_bytes: int, max_frames: int) -> tuple[np.ndarray, int]:
    """(N,) int64: the ticks at which frames are shown, in the order of decoding; and how long the last one is."""
    stsz = _of(tables, b"stsz")
    size, count = _unpack("II", stsz, 4)
    if count > max_frames:
        raise BadBoxes(f"it promises {count:,} frames; the limit is {max_frames:,}: cut it")
    sizes = np.full(count, size, np.int64) if size else _table(stsz, "u4", 8)["f0"].astype(np.int64)
    count = _check_places(tables, sizes, file_bytes)
    steps = _repeated(_of(tables, b"stts"), "u4,u4", count)
    times = np.cumsum(steps) - steps
    if b"ctts" in tables:
        times = times + _repeated(tables[b"ctts"], "u4,i4", count)
    return times, int(steps[-1]) if count else 0


def _repeated(content: memoryview, kind: str, count: int) -> np.ndarray:
    """(count,) int64: a table of how often and what, spelled out; what it does not say is as the last."""
    table = _table(content, kind)
    ends = np.minimum(np.cumsum(table["f0"].astype(np.int64)), count)
    values = np.repeat(table["f1"].astype(np.int64), np.diff(ends, prepend=0))
    last = values[-1:] if len(values) else [0]
    return np.concatenate([values, np.repeat(last, count - len(values))])


def _check_places(tables: dict[bytes, memoryview], sizes: np.ndarray, file_bytes: int) -> int:
    """How many of the frames have a place. Raises BadBoxes where one lies outside of the file."""
    chunks = tables.get(b"co64")
    offsets = _table(_of(tables, b"stco"), "u4")["f0"] if chunks is None else _table(chunks, "u8")["f0"]
    runs = _table(_of(tables, b"stsc"), "u4,u4,u4")
    firsts, per_chunk = runs["f0"].astype(np.int64) - 1, runs["f1"].astype(np.int64)
    if len(runs) and (firsts[0] != 0 or (np.diff(firsts) <= 0).any()):
        raise BadBoxes("it is damaged: its stsc box is out of order")
    lengths = np.diff(np.minimum(firsts, len(offsets)), append=len(offsets))
    ends = np.minimum(np.cumsum(np.repeat(np.minimum(per_chunk, len(sizes)), lengths)), len(sizes))
    places = np.concatenate([[0], np.cumsum(sizes)])
    last = offsets[: len(ends)].astype(np.float64) + np.diff(places[ends], prepend=0)
    if len(last) and last.max() > file_bytes:
        raise BadBoxes(f"it is cut short: it has {file_bytes:,} bytes, and its frames end at {last.max():,.0f}")
    return int(ends[-1]) if len(ends) else 0


def _shown(times: np.ndarray, elst: memoryview, timescale: int, movie_scale: int) -> np.ndarray:
    """Those of the times that an edit list shows, in the order of its parts."""
    edits = _table(elst, "u8,i8,u4" if elst[:1] == b"\1" else "u4,i4,u4")
    if len(edits) > MAX_EDITS:
        raise BadBoxes(f"its edit list has {len(edits):,} parts; the limit is {MAX_EDITS}: encode it again")
    shown, begins, count = [], 0, 0
    for duration, start, _ in edits.tolist():
        length = min((duration * timescale + movie_scale // 2) // movie_scale, _FOREVER) if duration else _FOREVER
        if start >= 0:  # else nothing is shown for a while
            part = times[(times >= start) & (times < start + length)]
            shown.append(part - start + begins)
            count += len(part)
        if count > len(times):
            raise BadBoxes("its edit list shows frames more than once: encode it again")
        begins = min(begins + length, _FOREVER)
    return np.concatenate(shown) if shown else times
