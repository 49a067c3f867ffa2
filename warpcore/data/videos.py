"""Videos: chosen frames of a video file's bytes as RGB pixels at a bucket's size, decoding no more than they need.

Decoding begins at the last key frame before the first of them, ends with the last, and leaves out frames that no
chosen one refers to. Which frames come out, and their pixels, are those of decoding the whole video: frame n is the
n-th that a player shows, whatever its time stamp. Only where a file's time stamps do not tell it, the video is decoded
from its beginning.
"""

import io
from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from warpcore.data.images import Crop, Geometry
from warpcore.data.video_headers import MAX_FRAME_PIXELS, START_BYTES, BadVideo, container_of, demuxer_of
from warpcore.data.video_pixels import FrameWriter, UntaggedMatrix
from warpcore.data.video_references import without_unused

MAX_DECODED_PIXELS = 2**33
"""What may be decoded for one clip: 4,000 frames of 1080p, 20 s of a core."""
_REMEDY = "which takes too long: encode it with a key frame every second or two, or cut it"
_ONE_FRAME_PER_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg", "prores")
"""Codecs whose packets show one frame each, so that time stamps of packets tell which one is the n-th. Of others, such
as VP8 with its hidden frames and MPEG-4 with packed ones, frames are counted as they are decoded."""
_MAX_DELAY = 32
"""Packets that may be decoded before one that is shown earlier: 16 frames of H.264 and H.265, each of two fields."""
_MAX_REPEATS = 4
"""How often a file's bytes may be read as packets: an edit list may show a part several times."""


class Clip(NamedTuple):
    """Pixels uint8 (T, H, W, 3) at the bucket's size, a view of planes (T, 3, H, W), and where they come from."""

    pixels: np.ndarray
    geometry: Geometry


def decode(
    data: bytes,
    frames: Sequence[int],
    size: tuple[int, int],
    crop: Crop = "center",
    seed: int = 0,
    *,
    untagged_matrix: UntaggedMatrix = "auto",
    max_pixels: int = MAX_FRAME_PIXELS,
    out: np.ndarray | None = None,
) -> Clip:
    """The chosen frames (numbers from 0, ascending) of the video in `data` as RGB at the bucket `size` (H, W).

    All frames share one crop: `center`, `random` (the seed decides) or `smart`, which looks at the first. Resized with
    bilinear anti-aliasing, as pictures are. Rotation, a mirror and the shape of pixels are applied; HDR is not
    tone-mapped, interlaced frames stay so, transparency is lost.
    out: (T, 3, H, W) uint8 to write to.

    Raises:
        BadVideo: the bytes are no video, are cut off or damaged, do not have these frames, or take too much to decode:
            frames of more than `max_pixels`, or more than MAX_DECODED_PIXELS before the last one.
    """
    import av

    if not frames or frames[0] < 0 or any(after <= before for before, after in pairwise(frames)):
        raise ValueError(f"frames to decode are ascending numbers, not {list(frames)}")
    if out is None:
        out = np.empty((len(frames), 3, *size), np.uint8)
    try:
        for chosen in (_by_time, _by_counting):
            with open_video(data, max_pixels) as container:
                stream, writer = video_stream(container, max_pixels), None
                done = 0
                for number, frame in chosen(container, stream, frames, _MAX_REPEATS * len(data)):
                    writer = writer or FrameWriter(
                        frame, stream.sample_aspect_ratio, size, crop, seed, untagged_matrix
                    )
                    writer.write(frame, out[number])
                    done += 1
                if done == len(frames):
                    return Clip(out.transpose(0, 2, 3, 1), writer.geometry)
    except (av.FFmpegError, ValueError, OverflowError) as error:  # all bytes are in memory: none is an I/O fault
        raise BadVideo(f"it can't be decoded ({getattr(error, 'strerror', None) or error})") from error
    raise BadVideo(f"it shows fewer frames than its header says: number {frames[-1]} is not there")


def open_video(data: bytes, max_pixels: int) -> Any:
    """PyAV's container of a video file's bytes, to be closed."""
    import av

    options = {"max_pixels": str(max_pixels), "threads": "1"}  # also of decoders that look for what headers lack
    demuxer = demuxer_of(container_of(data[:START_BYTES]))
    return av.open(io.BytesIO(data), format=demuxer, options=options, metadata_errors="replace")


def video_stream(container: Any, max_pixels: int) -> Any:
    """The first video of the file that is no cover picture, ready to be decoded."""
    from av.stream import Discard, Disposition

    stream = next((one for one in container.streams.video if not one.disposition & Disposition.attached_pic), None)
    if stream is None:
        kinds = sorted({one.type for one in container.streams}) or ["nothing"]
        raise BadVideo(f"it holds no video, but {' and '.join(kinds)}")
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    context = stream.codec_context
    if context is None:
        raise BadVideo("its codec is unknown: encode it as H.264, H.265, VP9 or AV1")
    if context.width * context.height > max_pixels:
        raise BadVideo(f"its frames have more than {max_pixels} pixels ({context.width} x {context.height} px)")
    context.thread_count = 1  # there are as many workers as the CPU can take
    context.options = {"max_pixels": str(max_pixels)}
    if context.name == "hevc":
        # Its decoder marks no frame as damaged, as that of H.264 does; and few files have checksums of their frames.
        context.options |= {"err_detect": "crccheck+explode"}
    return stream


# Which frames are decoded


def _by_time(container: Any, stream: Any, frames: Sequence[int], max_bytes: int) -> Iterator[tuple[int, Any]]:
    """(place in `frames`, decoded frame) where the time stamps of packets tell which ones it takes; else nothing."""
    found = None
    if stream.codec_context.codec.canonical_name in _ONE_FRAME_PER_PACKET:
        may_be_cut = container.format.name == "mpegts"  # as it is broadcast
        found = _find_packets(container.demux(stream), frames, max_bytes, may_be_cut)
    if found is None:
        return
    packets, times = found
    if len(packets) * stream.codec_context.width * stream.codec_context.height > MAX_DECODED_PIXELS:
        raise BadVideo(f"{len(packets)} frames have to be decoded for those that are wanted, {_REMEDY}")
    wanted = {time: place for place, time in enumerate(times)}
    is_wanted = [packet.pts in wanted and not packet.is_discard for packet in packets]
    for frame in decoded(stream.codec_context, without_unused(packets, is_wanted, stream.codec_context)):
        if frame.pts in wanted:
            yield wanted.pop(frame.pts), frame
        if not wanted:
            return


def _by_counting(container: Any, stream: Any, frames: Sequence[int], max_bytes: int) -> Iterator[tuple[int, Any]]:
    """The same, of a video that is decoded from its beginning."""
    packets = (packet for packet in container.demux(stream) if packet.size)
    wanted = {number: place for place, number in enumerate(frames)}
    for number, frame in enumerate(decoded(stream.codec_context, _bounded(packets, max_bytes))):
        if number in wanted:
            yield wanted[number], frame
        if number == frames[-1]:
            return


def _find_packets(
    packets: Iterator[Any], frames: Sequence[int], max_bytes: int, may_be_cut: bool
) -> tuple[list[Any], list[int]] | None:
    """The packets from the last key frame before the first of `frames` to the last, and the times of these frames.

    None where a packet has no time, two have the same, or no key frame comes first. may_be_cut: what comes before the
    first key frame is not shown.
    """
    held: list[Any] = []
    keys: list[int] = []  # their places in `held`
    times: list[int] = []  # of the frames that are shown, in the order of time
    first_time = None
    for packet in _bounded((packet for packet in packets if packet.size), max_bytes):
        if packet.pts is None:
            return None
        if packet.is_keyframe:
            if keys and len(times) <= frames[0]:  # all that is shown before the last key frame is too early
                del held[: keys[-1]]
                keys = [0]
            keys.append(len(held))
            first_time = packet.pts if first_time is None else first_time
        if first_time is None:
            if not may_be_cut:
                return None
            continue
        held.append(packet)
        if packet.pts >= first_time and not packet.is_discard:  # an edit list discards
            insort(times, packet.pts)
        if len(times) > frames[-1] + _MAX_DELAY:
            break
    if len(times) <= frames[-1]:
        raise BadVideo(f"it has {len(times)} frames; number {frames[-1]}, counted from 0, is not there")
    chosen = [times[number] for number in frames]
    wanted = set(chosen)
    places = [place for place, packet in enumerate(held) if not packet.is_discard and packet.pts in wanted]
    start = [key for key in keys if key <= places[0] and held[key].pts <= chosen[0]]
    if not start or len(places) != len(chosen):
        return None
    return held[start[-1] : places[-1] + 1], chosen


def _bounded(packets: Iterator[Any], max_bytes: int) -> Iterator[Any]:
    """The packets. A container may name the same bytes a million times: raises BadVideo."""
    for packet in packets:
        max_bytes -= packet.size
        if max_bytes < 0:
            raise BadVideo("its packets lie over one another in the file")
        yield packet


def decoded(context: Any, packets: Iterator[Any], max_pixels: float | None = None) -> Iterator[Any]:
    """Every frame of the packets, checked. Raises BadVideo; also after `max_pixels`, by default MAX_DECODED_PIXELS.

    A frame that refers to a damaged one is not marked as damaged: all are looked at, not only the chosen.
    """
    size, pixels_left = None, MAX_DECODED_PIXELS if max_pixels is None else max_pixels
    for packet in chain(packets, (None,)):  # None: what the decoder still holds
        if packet is not None and packet.is_corrupt:
            raise BadVideo("it is cut off or damaged: a frame's data is incomplete")
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise BadVideo("it is damaged: a frame can't be decoded")
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise BadVideo(f"its size changes from {size[0]} x {size[1]} to {frame.width} x {frame.height} px")
            pixels_left -= frame.width * frame.height
            if pixels_left < 0:
                raise BadVideo(f"too many frames have to be decoded before those that are wanted, {_REMEDY}")
            yield frame
