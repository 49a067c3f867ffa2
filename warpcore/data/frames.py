"""Which frames of a video a clip takes."""

import numpy as np

from warpcore.random import stable_hash


def choose_frames(
    num_frames: int, fps: float, wanted: int, *, stride: int = 1, frame_rate: float | None = None, seed: int
) -> list[int]:
    """The `wanted` frames that a sample takes of a video of `num_frames`: numbers from 0 in the order they are shown.

    The seed draws the first one, each with equal probability; the others follow at equal distances, `stride` frames or
    what `frame_rate` (per second) makes of the video's own `fps`. Open-Sora's loader spreads the same number of frames
    over `wanted * stride` frames, so that one gap or another is wider, and never draws the last possible beginning.

    Raises:
        ValueError: the video is shorter than `frames_needed`.
    """
    needed = int(frames_needed(wanted, fps, stride, frame_rate))
    if needed > num_frames:
        raise ValueError(f"{wanted} frames span {needed} of the video's, which has {num_frames}")
    first = stable_hash(seed, "first frame") % (num_frames - needed + 1)
    step = float(frame_distance(fps, stride, frame_rate))
    return [first + int(number * step + 0.5) for number in range(wanted)]


def frames_needed(
    wanted: int | np.ndarray, fps: float | np.ndarray, stride: int = 1, frame_rate: float | None = None
) -> np.ndarray:
    """int64: how many frames of a video a clip of `wanted` frames spans, from its first to its last.

    `wanted` and `fps` may be arrays, which broadcast; the result has the shape that they have together.
    """
    steps = np.asarray(wanted, np.int64) - 1
    return np.floor(steps * frame_distance(fps, stride, frame_rate) + 0.5).astype(np.int64) + 1


def frame_distance(fps: float | np.ndarray, stride: int = 1, frame_rate: float | None = None) -> np.ndarray:
    """float64: how many frames of the video lie between the beginnings of two of the clip's.

    At least 1: a video slower than `frame_rate`, or of unknown `fps` (0), keeps its frames, as none is shown twice.
    The clip's own frames per second are `fps / frame_distance(...)`.
    """
    fps = np.asarray(fps, np.float64)
    return np.full(fps.shape, float(stride)) if frame_rate is None else np.maximum(fps / frame_rate, 1.0)
