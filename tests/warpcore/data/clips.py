"""Small videos for tests, each frame of which shows its number, and what decoding them plainly gives."""

import functools
import io
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction

import av
import numpy as np

os.environ["SVT_LOG"] = "0"  # that encoder writes to the terminal otherwise

SIZE = (96, 160)
BITS, CELL = 10, 16


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 (H, W, 3): a moving texture, and in its first row ten cells, the bits of `number` from the lowest on."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin((columns + 3 * number) / (5 + channel)) * np.cos((rows - number) / 7) for channel in range(3)]
    picture = (128 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
    for bit in range(BITS):
        picture[:CELL, bit * CELL : (bit + 1) * CELL] = 235 if number >> bit & 1 else 20
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a frame (H, W, 3) of `numbered`, at its own size, shows."""
    middles = picture[CELL // 2, CELL // 2 : BITS * CELL : CELL].mean(axis=-1)
    return sum(1 << bit for bit, brightness in enumerate(middles) if brightness > 128)


def encode(
    pictures: Sequence[np.ndarray | av.VideoFrame],
    codec: str = "libx264",
    container: str = "mp4",
    *,
    rate: int = 24,
    times: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    tags: Mapping[str, int] | None = None,
    turn: Mapping[str, object] | None = None,
    pixel_shape: tuple[int, int] | None = None,
) -> bytes:
    """A video file.

    times: of every picture, in milliseconds. tags: attributes of the encoder. turn: how it is shown, as PyAV takes it.
    """
    file, time_base = io.BytesIO(), Fraction(1, rate if times is None else 1000)
    with av.open(file, "w", format=container) as opened:
        frames = [one if isinstance(one, av.VideoFrame) else av.VideoFrame.from_ndarray(one) for one in pictures]
        stream = opened.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if pixel_shape:
            stream.codec_context.sample_aspect_ratio = Fraction(*pixel_shape)
        if turn:
            stream.set_display_rotation(**turn)
        for number, frame in enumerate(frames):
            frame.pts = number if times is None else times[number]
            frame.time_base = time_base
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    return file.getvalue()


X265 = "log-level=none:pools=none:frame-threads=1"
_X264 = {"preset": "veryfast"}
_HIDDEN = {"cpu-used": "8", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "12", "g": "30"}
"""Options of libvpx: frames that are referred to and not shown."""


def _x265(parameters: str, container: str = "mp4") -> dict:
    options = {"preset": "ultrafast", "x265-params": f"{X265}:{parameters}"}
    return {"codec": "libx265", "container": container, "options": options}


KINDS: dict[str, dict] = {
    "h264": {"options": _X264 | {"g": "24", "bf": "3"}},
    "h264 open": {"options": _X264 | {"x264-params": "keyint=20:open-gop=1:bframes=3:b-pyramid=normal"}},
    "h264 ts": {"container": "mpegts", "options": _X264 | {"g": "24"}},
    "h264 mkv": {"container": "matroska", "options": _X264 | {"g": "30"}},
    "hevc": _x265("keyint=20:open-gop=1"),
    "hevc layers": _x265("keyint=30:temporal-layers=2:bframes=3:b-adapt=0"),
    "hevc ts": _x265("keyint=20", "mpegts"),
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp9 hidden": {"codec": "libvpx-vp9", "container": "webm", "options": _HIDDEN},
    "av1": {"codec": "libsvtav1", "container": "webm", "options": {"preset": "11", "svtav1-params": "lp=1"}},
    "mpeg4 avi": {"codec": "mpeg4", "container": "avi", "options": {"g": "20", "bf": "2"}},
    "vp8": {"codec": "libvpx", "container": "webm", "options": _HIDDEN},
}


@functools.cache
def clip(kind: str, variable: bool = False, num_frames: int = 60) -> bytes:
    """A video of numbered frames; its frame rate is constant, or changes from frame to frame."""
    times = np.cumsum(1 + np.arange(num_frames) ** 2 * 7 % 90).tolist() if variable else None
    return encode([numbered(number) for number in range(num_frames)], times=times, **KINDS[kind])


def decoded_plainly(data: bytes) -> list[av.VideoFrame]:
    """All frames, from the first packet on."""
    with av.open(io.BytesIO(data)) as opened:
        return list(opened.decode(video=0))
