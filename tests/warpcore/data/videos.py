"""Small videos for the tests, and what another reader says of them."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "vp8": "libvpx", "av1": "libsvtav1"}
QUIET = {
    "h264": {"x264-params": "mbtree=0"}, "hevc": {"x265-params": "log-level=none"}, "av1": {"preset": "12"},
}  # fmt: skip
"""x264's mbtree rounds differently from time to time."""
CLOCK = Fraction(1, 1000)
TABLES = [b"moov", b"trak", b"mdia", b"minf", b"stbl"]
"""Where an MP4's tables of frames lie."""


def video(
    frames: int = 10,
    size: tuple[int, int] = (64, 48),
    *,
    codec: str = "h264",
    container: str = "mp4",
    fps: int = 25,
    times: Sequence[int] | None = None,
    pixel_shape: Fraction | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """Frames that get brighter, of `size` (width, height); at these `times` in milliseconds, or `fps` per second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        if sound:
            track = output.add_stream("aac", rate=8000, layout="mono")
        stream = output.add_stream(CODECS.get(codec, codec), rate=fps, options=QUIET.get(codec, {}) | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if pixel_shape:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if times:
            stream.codec_context.time_base = CLOCK
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], CLOCK
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 8000
            output.mux(track.encode(samples))
            output.mux(track.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 without a video stream."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        track = output.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        output.mux(track.encode(samples))
        output.mux(track.encode())
    return file.getvalue()


def cut(content: bytes, first: int, last: int, container: str = "mp4") -> bytes:
    """Frames [first, last) by a copy of packets: an edit list hides those before, which the first ones refer to."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(content)) as whole,
        av.open(file, "w", format=container, options={"avoid_negative_ts": "disabled"}) as output,
    ):
        stream = whole.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size and packet.pts < last * packet.duration:
                packet.pts, packet.dts = (time - first * packet.duration for time in (packet.pts, packet.dts))
                packet.stream = copy
                output.mux(packet)
    return file.getvalue()


def moov_first(content: bytes) -> bytes:
    """The same MP4 with its header before its frames."""
    boxes, place = {}, 0
    while place < len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        boxes[kind] = content[place : place + size]
        place += size
    moov = bytearray(boxes.pop(b"moov"))
    table = moov.index(b"stco") + 8
    for place in range(table + 4, table + 4 + 4 * struct.unpack_from(">I", moov, table)[0], 4):
        struct.pack_into(">I", moov, place, struct.unpack_from(">I", moov, place)[0] + len(moov))
    return boxes.pop(b"ftyp") + moov + b"".join(boxes.values())


def turned(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The same MP4 whose video is shown turned: `matrix` is (a, b, c, d) of its track's header."""
    place = content.index(b"tkhd") + 44
    a, b, c, d = (number << 16 for number in matrix)
    return content[:place] + struct.pack(">6i", a, b, 0, c, d, 0) + content[place + 24 :]


def with_number(content: bytes, box: bytes, offset: int, number: int) -> bytes:
    """The same MP4 with 4 bytes changed, `offset` bytes after the type of the first box of that type."""
    place = content.index(box) + 4 + offset
    return content[:place] + struct.pack(">I", number) + content[place + 4 :]


def with_table(data: bytes, path: list[bytes], numbers: list[int]) -> bytes:
    """MP4 boxes of which that at `path` (types, the outermost first) holds a table of 32-bit numbers instead."""
    boxes, place = b"", 0
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        content, place = data[place + 8 : place + size], place + size
        if kind == path[0]:
            table = np.array([0, *numbers], ">u4").tobytes()
            content = with_table(content, path[1:], numbers) if path[1:] else table
        boxes += (len(content) + 8).to_bytes(4, "big") + kind + content
    return boxes


def with_frames(content: bytes, frames: int, sizes: list[int]) -> bytes:
    """The same MP4 promising this many frames of `sizes` (bytes), one after the other from the first on."""
    content = content.replace(b"edts", b"free")  # it says how long all of them are shown
    for box, numbers in {
        b"stts": [1, frames, 512],
        b"stsz": [0, frames, *sizes, *[0] * (frames - len(sizes))],
        b"stsc": [1, 1, frames, 1],
    }.items():
        content = with_table(content, [*TABLES, box], numbers)
    return content


def decoded(content: bytes) -> list[av.VideoFrame]:
    """All frames that FFmpeg shows."""
    with av.open(io.BytesIO(content)) as opened:
        return list(opened.decode(video=0))
