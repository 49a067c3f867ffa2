"""Clips to look at, uint8 (T, H, W, 3): as mp4 and animated WebP, and in a sheet of pictures."""

import io
import math
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from warpcore.files import write_whole
from warpcore.redaction import redact

BT601 = 5  # as ffmpeg numbers matrices and primaries
MAX_SIDE = 16_382
"""In px, of H.264 and WebP; of larger clips every second pixel, or every third, ... is shown."""
MAX_PIXELS = 2**26
"""Of all frames of a sheet that moves, about: 200 MB, which are compressed in seconds rather than in minutes."""
MIN_FPS = 1 / 600
"""Slower clips are shown at this rate: GIF and WebP count a frame's time in few bits."""
STRIP_FRAMES = 4
"""How many frames of a clip a sheet shows."""


def check_clip(clip: np.ndarray) -> None:
    """Raises ValueError for what is no clip, uint8 (T, H, W, 3)."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not clip.size:
        raise ValueError(f"a clip is uint8 (T, H, W, 3) with at least one frame, got {clip.dtype} {clip.shape}")


def step_within(pixels: int) -> int:
    """The step between pixels of a row, and between rows, that leaves about MAX_PIXELS of `pixels`; 1 leaves all."""
    return max(1, math.ceil(math.sqrt(pixels / MAX_PIXELS)))


def _small_enough(clip: np.ndarray) -> np.ndarray:
    check_clip(clip)
    step = -(-max(clip.shape[1:3]) // MAX_SIDE)
    return np.ascontiguousarray(clip[:, ::step, ::step])


def encode_mp4(clip: np.ndarray, fps: float, crf: int = 16, about: str = "") -> bytes:
    """The clip as H.264 in an mp4 that every browser plays (yuv420p, BT.601). The same clip, the same bytes.

    Odd sides grow by one pixel, their last row or column once more: yuv420p has one colour for each 2 x 2 pixels.

    crf: x264's quality: 0 is lossless, 51 the worst. about: a text that the file holds beside the clip.
    """
    import av

    clip = _small_enough(clip)
    odd_height, odd_width = (side % 2 for side in clip.shape[1:3])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = redact(about)
        stream = container.add_stream("libx264", rate=Fraction(max(fps, MIN_FPS)).limit_denominator(1001))
        stream.height, stream.width = clip.shape[1] + odd_height, clip.shape[2] + odd_width
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}  # mbtree rounds differently from time to time
        context = stream.codec_context
        context.thread_count, context.colorspace, context.color_range = 1, BT601, 1
        for pixels in clip:
            pixels = np.pad(pixels, ((0, odd_height), (0, odd_width), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT601, dst_color_range=1, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def about_of(mp4: bytes) -> str:
    """The text that `encode_mp4` wrote beside the clip; empty where there is none, or nothing that can be read."""
    import av

    with suppress(av.error.FFmpegError, UnicodeError), av.open(io.BytesIO(mp4), metadata_errors="ignore") as container:
        return container.metadata.get("comment", "")
    return ""


def encode_webp(clip: np.ndarray, fps: float, quality: int = 90) -> bytes:
    """The clip as an animated WebP, which begins again at its end."""
    first, *others = map(Image.fromarray, _small_enough(clip))
    times = [round(1000 * number / max(fps, MIN_FPS)) for number in range(len(clip) + 1)]
    durations = [end - start for start, end in pairwise(times)]
    file = io.BytesIO()
    first.save(
        file, format="WEBP", save_all=True, append_images=others, duration=durations, loop=0, quality=quality, method=4
    )
    return file.getvalue()


def encode_gif(clip: np.ndarray, fps: float) -> bytes:
    """The clip as an animated GIF: what TensorBoard shows moving."""
    check_clip(clip)
    first, *others = map(Image.fromarray, clip)
    file, duration = io.BytesIO(), round(1000 / max(fps, MIN_FPS))
    first.save(file, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return file.getvalue()


def save_clip(path: Path, clip: np.ndarray, fps: float) -> None:
    """Writes the clip beside `path`, as mp4 and as animated WebP: NAME.mp4 and NAME.webp for NAME.png. Each file
    appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".mp4"), encode_mp4(clip, fps))
    write_whole(path.with_suffix(".webp"), encode_webp(clip, fps))


def strip(clip: np.ndarray, count: int = STRIP_FRAMES) -> np.ndarray:
    """Frames of a clip side by side, the first, the last and others between them: uint8 (H, W * frames, 3)."""
    check_clip(clip)
    chosen = np.unique(np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int))
    return np.hstack(clip[chosen])
