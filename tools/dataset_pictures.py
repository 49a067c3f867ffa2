"""What a page of data shows of a picture or a clip: small copies as data URIs, and how it was cropped."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tools.near_duplicates import SIDE, Fingerprint, fingerprint
from warpcore.clips import encode_mp4
from warpcore.data import images, videos
from warpcore.data.images import Geometry
from warpcore.data.samples import VISUAL_EXTENSIONS, Sample
from warpcore.data.video_headers import MAX_FRAME_PIXELS
from warpcore.pictures import shrunk

CROP_PX, WHOLE_PX, BESIDE_PX, CLIP_PX = 224, 160, 112, 128
"""The longer side, at most, of a picture as training sees it, of its whole picture, of masks and such, of a clip."""
CLIP_FRAMES, CLIP_BYTES = 64, 400_000
"""The most frames, and bytes, of a clip that is shown."""
QUALITY = 80


@dataclass(frozen=True)
class WholePicture:
    """The whole picture of a sample, or the first frame of its video, beside the crop that training takes of it."""

    pixels: np.ndarray
    """uint8 (H, W, 3), small."""
    box: tuple[float, float, float, float] | None
    """(left, top, right, bottom) of the crop as shares of the whole; None where nothing was cropped."""
    seen: Fingerprint


@dataclass(frozen=True)
class WholeField:
    """A `warpcore.data.fields.Field`: the whole picture of every sample, of bytes that are read anyway."""

    max_pixels: int
    background: tuple[int, int, int] = (255, 255, 255)
    longest: int = WHOLE_PX
    suffixes: tuple[str, ...] = VISUAL_EXTENSIONS

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> WholePicture:
        height, width = (sample.height, sample.width) if geometry is None else geometry.source
        scale = min(1.0, self.longest / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if sample.is_video:
            pixels = videos.decode(data, [0], size, max_pixels=min(self.max_pixels, MAX_FRAME_PIXELS)).pixels[0]
        else:
            pixels = images.decode(data, size, background=self.background, max_pixels=self.max_pixels).pixels
        pixels, box = np.ascontiguousarray(pixels), None
        if geometry is not None:
            left, top, right, bottom = geometry.box
            box = left / width, top / height, right / width, bottom / height
        return WholePicture(pixels, box, fingerprint(pixels, width / height))

    def blank(self, size: tuple[int, ...]) -> Any:
        return None


@dataclass(frozen=True)
class FingerprintField(WholeField):
    """The same, of which only the fingerprint is kept."""

    longest: int = 4 * SIDE

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Fingerprint:
        return super().decode(data, geometry, sample).seen


def picture_uri(pixels: np.ndarray, longest: int) -> str:
    """A picture, uint8 (H, W, 3), whose longer side is at most `longest` pixels."""
    file = io.BytesIO()
    Image.fromarray(shrunk(np.ascontiguousarray(pixels), longest)).save(file, "WEBP", quality=QUALITY)
    return _uri("image/webp", file.getvalue())


def clip_uri(clip: np.ndarray, fps: float) -> str | None:
    """The first frames of a clip, uint8 (T, H, W, 3), as mp4 that plays; None where that has too many bytes."""
    frames = np.stack([shrunk(np.ascontiguousarray(frame), CLIP_PX) for frame in clip[:CLIP_FRAMES]])
    content = encode_mp4(frames, fps or 8.0, crf=26)
    return _uri("video/mp4", content) if len(content) <= CLIP_BYTES else None


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
