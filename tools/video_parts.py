"""Parts of videos: pieces between given times, and single frames as pictures."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from warpcore.data.video_headers import MAX_FRAME_PIXELS, BadVideo, Header, read_header
from warpcore.data.video_pixels import turn_of
from warpcore.data.videos import decode, decoded, open_video, video_stream
from warpcore.safe_json import parse_json

CUTS = "cuts"
"""The field or column with the pieces of a video: [[start, end], ...] in seconds."""
_QUALITY = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}  # mbtree rounds differently from time to time
"""Of H.264: hard to tell from the original."""
_JPEG = {"quality": 95, "subsampling": 0}
MAX_PIECES = 100_000
"""Of a video; times that can't be true make more."""
_MAX_SECONDS = 2**53
_WITHOUT_SEEKING = ("avi", "mpegts")
"""Containers that do not tell when their key frames are shown: those are decoded from the beginning."""
_LEAD_SECONDS = 1.0
"""Decoding begins so long before a cut: frames that are shown before a key frame may follow it in the file."""
_NEAR = 1e-6
"""Seconds by which a frame may miss the start of a cut, as times in a table are rounded."""
_DECODED_TOGETHER = 32
_PIXELS_TOGETHER, _PIXELS_BETWEEN = 2**26, 2**32
"""Of frames that are decoded together, and of all frames up to the last of them."""


@dataclass(frozen=True)
class Parts:
    """What becomes of videos."""

    cut_seconds: float | None = None
    """Those without cuts of their own are cut into pieces of this length, the last one shorter."""
    frames_every: int | None = None
    """In place of videos, each frame of a number that it divides becomes a picture."""

    def cuts(self, header: Header, given: Any) -> Sequence[tuple[float, float]] | None:
        """Start and end in seconds of each piece of a video; None where it stays whole.

        given: what the video's own CUTS say.

        Raises:
            BadVideo: they are no times.
        """
        if isinstance(given, str):  # of a .csv
            try:
                given = parse_json(given)
            except ValueError:
                given = [given]
        if given is not None:
            if not (isinstance(given, list) and all(map(_is_cut, given))):
                raise BadVideo(f"its {CUTS} are no pairs of seconds such as [[0, 2.5], [4, 8]]")
            return [(float(start), float(end)) for start, end in given]
        if self.cut_seconds is None or header.seconds <= self.cut_seconds + _NEAR:
            return None
        pieces = int(np.ceil(header.seconds / self.cut_seconds - _NEAR))
        if pieces > MAX_PIECES:
            raise BadVideo(f"pieces of this length are more than {MAX_PIECES}")
        return [(number * self.cut_seconds, (number + 1) * self.cut_seconds) for number in range(pieces)]


WHOLE = Parts()


@dataclass(frozen=True)
class Part:
    """A piece of a video, or a frame of one."""

    extension: str
    content: bytes
    size: tuple[int, int]
    """(width, height) in px as shown."""
    fields: dict[str, float]
    """Where in the video it is: `cut_start` and `cut_end` in seconds, or the number of the `frame`."""


def cut_out(content: bytes, header: Header, start: float, end: float) -> Part | None:
    """The frames of a video that are shown from `start` on and before `end`, in seconds after its first frame.

    They are encoded again, as H.264 with a key frame in every second: copied packets can only begin at key frames.
    Times of frames, colours and the shape of pixels stay; rotation is applied; sound is left out. None where there are
    no such frames.

    Raises:
        BadVideo: the video is damaged.
    """
    import av

    if start >= header.seconds:
        return None
    file = io.BytesIO()
    try:
        with open_video(content, MAX_FRAME_PIXELS) as source, av.open(file, "w", format="mp4") as output:
            stream = video_stream(source, MAX_FRAME_PIXELS)
            encoder = output.add_stream("libx264", rate=max(1, round(header.fps)), options=_QUALITY)
            first = None
            for frame in _upright(source, stream, start, end):
                if first is None:
                    first = frame.pts
                    _prepare(encoder.codec_context, frame, stream, header)
                frame.pts, frame.pict_type = frame.pts - first, 0
                output.mux(encoder.encode(frame))
            if first is None:
                return None
            output.mux(encoder.encode())
    except av.FFmpegError as error:
        raise BadVideo(f"it can't be cut: {error.strerror or error}") from None
    made = read_header(file)
    return Part("mp4", file.getvalue(), (made.width, made.height), {"cut_start": start, "cut_end": end})


def pictures_of(content: bytes, header: Header, every: int) -> Iterator[Part]:
    """The frames 0, `every`, 2 `every`, ... of a video as JPEGs, as they are shown.

    Raises:
        BadVideo: the video is damaged.
    """
    pixels = header.width * header.height
    together = max(1, min(_DECODED_TOGETHER, _PIXELS_TOGETHER // pixels, _PIXELS_BETWEEN // (every * pixels)))
    numbers = range(0, header.num_frames, every)
    for begin in range(0, len(numbers), together):
        chosen = numbers[begin : begin + together]
        clip = decode(content, list(chosen), (header.height, header.width))
        for number, frame in zip(chosen, clip.pixels, strict=True):
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(frame)).save(file, "JPEG", **_JPEG)
            yield Part("jpg", file.getvalue(), (header.width, header.height), {"frame": number})


def _is_cut(pair: Any) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(one) in (int, float) for one in pair)
    return is_pair and 0 <= pair[0] < pair[1] <= _MAX_SECONDS


def _upright(source: Any, stream: Any, start: float, end: float) -> Iterator[Any]:
    """The frames of a cut as they are shown, in a form that H.264 is commonly played in."""
    base, begin = stream.time_base, stream.start_time or 0
    container, graph = source.format.name, None
    if container not in _WITHOUT_SEEKING:
        source.seek(begin + int(max(0.0, start - _LEAD_SECONDS) / base), stream=stream)
    packets = (packet for packet in source.demux(stream) if packet.size)
    for number, frame in enumerate(decoded(stream.codec_context, packets, math.inf)):
        if container == "avi":  # has one clock for all its frames, and knows no other order than that of decoding
            frame.pts = begin + number
        if frame.pts is None:
            raise BadVideo("it does not say when its frames are shown")
        time = float((frame.pts - begin) * base)
        if time >= end - _NEAR:
            return
        if time >= start - _NEAR:
            graph = graph or _filters(stream, frame)
            graph.push(frame)
            yield graph.pull()


def _filters(stream: Any, frame: Any) -> Any:
    """What turns frames as they are shown, in 4:2:0, which has even sides."""
    import av

    turn, graph = turn_of(frame), av.filter.Graph()
    named = [("transpose", "cclock_flip")] * turn.swaps + [("vflip", "")] * turn.flips_rows
    named += [("hflip", "")] * turn.flips_columns
    named += [("crop", "trunc(iw/2)*2:trunc(ih/2)*2"), ("format", "yuv420p"), ("buffersink", "")]
    nodes = [graph.add_buffer(template=stream), *(graph.add(*one) for one in named)]
    graph.link_nodes(*nodes).configure()
    return graph


def _prepare(context: Any, frame: Any, stream: Any, header: Header) -> None:
    """Tell the encoder what its first frame is like."""
    shape = stream.sample_aspect_ratio or Fraction(1)
    context.width, context.height, context.pix_fmt = frame.width, frame.height, "yuv420p"
    context.sample_aspect_ratio = 1 / shape if header.rotation in (90, 270) else shape
    context.time_base, context.gop_size = stream.time_base, max(1, round(header.fps))
    context.thread_count = 1  # the same bytes on every machine
    decoder = stream.codec_context
    context.color_range, context.colorspace = frame.color_range, frame.colorspace
    context.color_primaries, context.color_trc = decoder.color_primaries, decoder.color_trc
