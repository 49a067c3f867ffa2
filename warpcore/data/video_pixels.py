"""Decoded frames of a video to RGB at a bucket's size: matrix, range, rotation, shape of pixels, resize and crop."""

import math
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from warpcore.data.buckets import resized_size
from warpcore.data.images import Crop, Stored, place
from warpcore.data.video_headers import MAX_FRAME_PIXELS, BadVideo, shown_size

UntaggedMatrix = Literal["auto", "bt601", "bt709"]
"""How colours are meant where a file does not say. ffmpeg takes BT.601 for all, though HD video is BT.709 in truth;
`auto` takes BT.709 where rows and columns are 720 or more, as players do."""
_UNSPECIFIED = (2, 3)
"""AVCOL_SPC_UNSPECIFIED and AVCOL_SPC_RESERVED (H.273, table 4)."""
_BT709_ROWS = 720
_PLANES_OF_RGB = (2, 0, 1)
"""swscale's planes are G, B, R."""


class FrameWriter:
    """Frames of one video to pixels of a bucket, all with the crop of the first."""

    def __init__(
        self,
        frame: Any,
        pixel_shape: Fraction | None,
        size: tuple[int, int],
        crop: Crop,
        seed: int,
        untagged_matrix: UntaggedMatrix,
    ):
        """frame: PyAV's, the first. pixel_shape: width of a pixel by its height; None: square. size: bucket (H, W).

        Raises:
            BadVideo: a shape of pixels or a rotation that can't be, or frames so long that resizing takes too much.
        """
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        self._matrix = _matrix(frame, untagged_matrix)
        self._turn = turn_of(frame)
        shown = shown_size(frame.width, frame.height, float(pixel_shape or 1), 90 if self._turn.swaps else 0)
        source = shown[::-1]
        self._resized = resized_size(*source, size)
        if math.prod(self._resized) > MAX_FRAME_PIXELS:
            raise BadVideo(
                f"to cover {size[1]} x {size[0]} px its frames of {shown[0]} x {shown[1]} px would become "
                f"{self._resized[1]} x {self._resized[0]} px; the limit is {MAX_FRAME_PIXELS:,} pixels"
            )
        stored = Stored(np.stack(self._planes(frame), axis=-1), source) if crop == "smart" else None
        self.geometry = place(source, size, crop, seed, stored)

    def write(self, frame: Any, out: np.ndarray) -> None:
        """out: uint8 (3, H, W)."""
        (height, width), geometry = out.shape[1:], self.geometry
        rows, columns = slice(geometry.top, geometry.top + height), slice(geometry.left, geometry.left + width)
        for plane, target in zip(self._planes(frame), out, strict=True):
            target[:] = plane[rows, columns]

    def _planes(self, frame: Any) -> list[np.ndarray]:
        """The channels R, G, B of the whole frame, upright and resized: (h, w) each."""
        from av.video.reformatter import Interpolation

        height, width = self._resized[::-1] if self._turn.swaps else self._resized
        # To planes, because swscale gives packed RGB half as many columns of colour as it has of brightness.
        scaled = self._reformatter.reformat(
            frame, width, height, "gbrp", src_colorspace=self._matrix, interpolation=Interpolation.BILINEAR, threads=1
        )
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in scaled.planes]
        return [self._turn.apply(planes[number][:height, :width]) for number in _PLANES_OF_RGB]


class _Turn(NamedTuple):
    """A rotation by quarter turns, perhaps with a mirror."""

    swaps: bool
    flips_rows: bool
    flips_columns: bool

    def apply(self, plane: np.ndarray) -> np.ndarray:
        plane = plane.swapaxes(0, 1) if self.swaps else plane
        return plane[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1]


def turn_of(frame: Any) -> _Turn:
    """How a frame is turned to be shown. Raises BadVideo where that is no multiple of a quarter turn."""
    matrix = next((np.frombuffer(one, np.int32) for one in frame.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return _Turn(False, False, False)
    a, b, _, c, d = matrix[:5].tolist()  # (x, y) is shown at (a x + c y, b x + d y)
    if a and d and not b and not c:
        return _Turn(False, d < 0, a < 0)
    if b and c and not a and not d:
        return _Turn(True, b < 0, c < 0)
    raise BadVideo(f"it is shown turned by {frame.rotation} degrees, which is no multiple of 90")


def _matrix(frame: Any, untagged: UntaggedMatrix) -> Any:
    """swscale's name of the matrix of a frame that does not tell its own; None where it does."""
    from av.video.reformatter import Colorspace

    if frame.colorspace not in _UNSPECIFIED:
        return None
    is_bt709 = untagged == "bt709" or (untagged == "auto" and min(frame.width, frame.height) >= _BT709_ROWS)
    return Colorspace.ITU709 if is_bt709 else Colorspace.ITU601
