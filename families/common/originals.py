"""Pictures and clips out of files, for an autoencoder to rebuild."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from families.common.pictures import read_picture, size_of
from warpcore.data import videos
from warpcore.data.picture_files import LeftOut, is_video
from warpcore.data.video_headers import BadVideo, read_header
from warpcore.errors import UserError
from warpcore.files import read_bytes


class Original(NamedTuple):
    """A picture (3, H, W), or the first frames of a video (T, 3, H, W), in [0, 1]."""

    file: Path
    pixels: Tensor
    fps: float | None = None
    """Of a clip; None for a picture."""


def read_originals(
    files: Sequence[Path], most: int, left_out: LeftOut, *, side: int | None, num_frames: int, stride: int
) -> list[Original]:
    """The first files that can be read, `most` at most; others are counted in `left_out`.

    Args:
        side: scale to the area of a square with this side, in px; None keeps the size.
        num_frames: taken of a video, from its first on, every `stride`-th; fewer where it is shorter.

    Raises:
        UserError: none can be read.
    """
    found: list[Original] = []
    problem = None
    for file in dict.fromkeys(files):
        if len(found) == most:
            break
        kind = "video" if is_video(file) else "picture"
        try:
            if kind == "video":
                found.append(_read_clip(file, side, num_frames, stride))
            else:
                found.append(Original(file, read_picture(file, _scaled(size_of(file), side))))
        except UserError as error:
            left_out.add(f"that cannot be read as a {kind}", file)
            problem = problem or error
    if not found:
        raise UserError(f"pictures: there is none to rebuild: {problem}") from problem
    return found


def _read_clip(file: Path, side: int | None, num_frames: int, stride: int) -> Original:
    data = read_bytes(file)
    try:
        header = read_header(io.BytesIO(data))
        frames = range(header.num_frames)[::stride][:num_frames]
        size = _scaled((header.height, header.width), side)
        pixels = videos.decode(data, frames, size).pixels
    except BadVideo as error:
        raise UserError(f"{file} cannot be read as a video: {error}") from error
    return Original(file, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, header.fps / stride)


def _scaled(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """(H, W) in px: `size`, or of its shape with the area of a square of `side`."""
    height, width = size
    scale = 1 if side is None else side / (height * width) ** 0.5
    return max(1, round(height * scale)), max(1, round(width * scale))
