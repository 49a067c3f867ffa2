"""What the index has to know of a video, read from its container, without decoding more than one frame.

MP4 and MOV say it in their `moov` box, wherever it lies (`mp4_boxes`). Matroska, WebM, AVI, MPEG-TS and fragmented MP4
have no count of frames: their packets are counted, which reads all of their bytes, in FFmpeg's demuxer of that very
format; of all but MP4 the first frame is decoded, which alone tells a rotation. Formats that refer to other files,
such as playlists, are never opened.
"""

import io
import math
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from warpcore.data.mp4_boxes import BadBoxes, Mp4Track, read_track
from warpcore.data.picture_costs import BadPicture

MAX_FRAMES = 2**19
"""Of a video: almost five hours at 30 frames per second. Longer ones are cut before they are packed."""
MAX_FRAME_PIXELS = 35_651_584
"""The largest frame of H.265's levels up to 6.2 (H.265, table A.8), and about that of H.264 and AV1."""
MAX_FPS = 1000.0
MAX_PIXEL_SHAPE = 16
"""How many times as wide as high, or as high as wide, pixels may be."""
MAX_SHIFT = 0.25
"""Of a constant rate, in frames: how far from its place any frame may be shown. Clocks of milliseconds round."""
_MP4_TYPES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_TS_PACKETS = ((0, 188), (4, 192))
"""Where the mark of a packet stands, and the length of packets: of MPEG-TS, and of M2TS with a time before each."""
_TS_MARK = 0x47
START_BYTES = 2 * _TS_PACKETS[-1][1]
"""Of a file, by which its container is told."""
_DEMUXERS = {"mp4": "mov", "matroska": "matroska", "avi": "avi", "mpegts": "mpegts"}
_VP8_SHOWN = 0x10


class BadVideo(BadPicture):
    """The bytes are no video that can be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a container says of its first video stream."""

    width: int
    height: int
    """In px as shown: rotated, and with square pixels."""
    num_frames: int
    """Frames that are shown: those that an edit list cuts away do not count."""
    fps: float
    """Frames per second, on average."""
    seconds: float
    """How long they are shown."""
    codec: str
    """As FFmpeg calls it: h264, hevc, vp9, av1, ..."""
    constant_rate: bool
    """Whether all frames are shown about equally long (MAX_SHIFT)."""
    rotation: int
    """0, 90, 180 or 270 degrees, clockwise, by which decoded frames are turned to be shown."""


def read_header(file: BinaryIO) -> Header:
    """The header of a video in an open file.

    Raises:
        BadVideo: it is none, is cut short, has no video stream or no frame, or promises what can't be true.
        OSError, UserError: the file can't be read.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    container = container_of(file.read(START_BYTES))
    track = None
    try:
        if container == "mp4":
            track = read_track(file, size, MAX_FRAMES)
    except BadBoxes as error:
        raise BadVideo(str(error)) from None
    if track is None or track.times is None:
        return _demuxed(file, container, track)
    return _header(track.times / track.timescale, track.tick_of_last / track.timescale, track)


def container_of(start: bytes) -> str:
    """The container whose file begins so: `mp4`, `matroska`, `avi` or `mpegts`, whatever its extension says.

    Args:
        start: START_BYTES or more, or all of the file.

    Raises:
        BadVideo: it is none of them.
    """
    if start[4:8] in _MP4_TYPES:
        return "mp4"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    for place, length in _TS_PACKETS:
        if len(start) >= place + length and all(byte == _TS_MARK for byte in start[place::length]):
            return "mpegts"
    raise BadVideo("empty file" if not start else "it is no MP4, MOV, WebM, Matroska, AVI or MPEG-TS")


def demuxer_of(container: str) -> str:
    """FFmpeg's name for the one demuxer that opens such a file, so that no other format is tried."""
    return _DEMUXERS[container]


def shown_size(width: int, height: int, pixel_shape: float, rotation: int) -> tuple[int, int]:
    """(width, height) in px at which coded frames of (width, height) are shown: what is too small is enlarged.

    Args:
        pixel_shape: the width of a pixel by its height.
        rotation: 0, 90, 180 or 270 degrees.

    Raises:
        BadVideo: pixels of an impossible shape.
    """
    if not 1 / MAX_PIXEL_SHAPE <= pixel_shape <= MAX_PIXEL_SHAPE:
        raise BadVideo(f"its pixels are said to be {pixel_shape:.3g} times as wide as high")
    width, height = round(width * max(1.0, pixel_shape)), round(height * max(1.0, 1 / pixel_shape))
    return (height, width) if rotation in (90, 270) else (width, height)


def _header(times: np.ndarray, last: float, track: Mp4Track) -> Header:
    """Of frames that are shown at `times` (N,) in seconds, the last one for `last` seconds."""
    count = len(times)
    if not count:
        raise BadVideo("it has no frame that is shown")
    if track.width * track.height <= 0:
        raise BadVideo(f"its frames have an impossible size ({track.width} x {track.height} px)")
    if track.width * track.height > MAX_FRAME_PIXELS:
        raise BadVideo(f"its frames have {track.width} x {track.height} px; the limit is {MAX_FRAME_PIXELS:,} pixels")
    times = np.sort(times)
    interval = (times[-1] - times[0]) / (count - 1) if count > 1 else last
    if count == 1 and not interval > 0:
        interval = 1.0  # a picture in a video's clothes, which says nothing of time
    fps = 1 / interval if interval > 0 else math.inf
    if not 0 < fps <= MAX_FPS:
        raise BadVideo(f"its frame rate can't be true ({fps:.4g} frames per second)")
    shifts = np.abs(times - times[0] - interval * np.arange(count))
    width, height = shown_size(track.width, track.height, track.pixel_shape, track.rotation)
    return Header(
        width,
        height,
        count,
        float(fps),
        float(interval * count),
        track.codec,
        bool(shifts.max() <= MAX_SHIFT * interval),
        track.rotation,
    )


def _demuxed(file: BinaryIO, container: str, track_of_boxes: Mp4Track | None) -> Header:
    """By the packets of a file, and its first frame; of an MP4, what its boxes say of the track counts."""
    import av  # takes a fifth of a second, and FFmpeg

    file.seek(0)
    try:
        with av.open(file, format=demuxer_of(container), metadata_errors="replace") as opened:
            if not opened.streams.video:
                raise BadVideo("it has no video stream")
            stream = opened.streams.video[0]
            context, base = stream.codec_context, float(stream.time_base or 0)
            if context is None:
                raise BadVideo("its video stream is of an unknown codec")
            shape, codec = stream.sample_aspect_ratio or context.sample_aspect_ratio, context.name
            name = stream.codec.canonical_name
            track = track_of_boxes or Mp4Track(context.width, context.height, name, float(shape or 1))
            times, last, first = [], 0.0, None
            context.thread_count, context.options = 1, {"max_pixels": str(MAX_FRAME_PIXELS)}
            for packet in opened.demux(stream):
                if track_of_boxes is None and first is None and packet.size:
                    first = next(iter(context.decode(packet)), None)
                if not packet.size or packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] & _VP8_SHOWN):
                    continue
                if len(times) == MAX_FRAMES:
                    raise BadVideo(f"it has more than {MAX_FRAMES:,} frames: cut it")
                time = packet.dts if packet.pts is None else packet.pts
                times.append(len(times) / float(stream.average_rate or 25) if time is None else time * base)
                last = float((packet.duration or 0) * base)
            if track_of_boxes is None and first is None:
                first = next(iter(context.decode(None)), None)
    except av.FFmpegError as error:
        raise BadVideo(f"it is cut short or damaged ({container}: {error.strerror or error})") from None
    if first is not None:  # frames alone tell a rotation
        track = replace(track, rotation=round(-first.rotation / 90) * 90 % 360)
    return _header(np.array(times), last, track)
