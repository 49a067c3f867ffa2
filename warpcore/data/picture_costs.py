"""What it takes to decode a picture, judged from its header: few bytes may claim many pixels."""

from PIL import Image

from warpcore.data import jpeg_scans
from warpcore.data.jpeg_scans import Scan

MAX_PIXELS = 2**27  # 134 MP: above what cameras make, and 400 MB once decoded
MAX_BYTES = 2**30
"""Memory that decoding a picture may take, or `_BYTES_OF_A_PIXEL` for each pixel that it may have if that's more."""
_BYTES_OF_A_PIXEL = 5
_MAX_SCANS = 16
"""A progressive JPEG has about 10 scans, each of which takes time for all pixels."""
_RGB_BYTES = 3
_COEFFICIENT_BYTES = 2 * 64
"""Per block. Of a JPEG of several scans libjpeg keeps all blocks."""
_DECODER_BYTES = {"WEBP": 12, "QOI": 12, "AVIF": 12, "JPEG2000": 20}
"""Per pixel, of decoders that keep more than the picture that Pillow makes."""
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Per pixel in Pillow; 4 in other modes."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


class BadPicture(Exception):
    """The bytes are no picture that can be read; the message says why."""


def check_pixels(picture: Image.Image, max_pixels: int) -> None:
    """Raises BadPicture for a larger one."""
    if picture.width * picture.height > max_pixels:
        raise BadPicture(f"it has more than the limit of {max_pixels} pixels ({picture.width} x {picture.height} px)")


def check_memory(picture: Image.Image, max_pixels: int, scans: list[Scan] | None = None, reduction: int = 1) -> None:
    """Raises BadPicture if decoding an opened picture, of a JPEG's `scans` at 1/`reduction`, takes too much."""
    pixels = picture.width * picture.height
    if picture.format == "TIFF":
        pixels = max(pixels, _tile_pixels(picture))
    stored = _DECODER_BYTES.get(picture.format, 0) + _MODE_BYTES.get(picture.mode, 4)
    needed = pixels * (stored + _RGB_BYTES)
    if scans is not None:
        whole = picture.mode not in ("L", "RGB")  # by Pillow
        needed = pixels * (4 + _RGB_BYTES if whole else _RGB_BYTES / reduction**2)
        if "progressive" in picture.info or len(scans) > 1:
            needed += jpeg_scans.blocks(picture) * _COEFFICIENT_BYTES
        if len(scans) * pixels > _MAX_SCANS * max(MAX_PIXELS, max_pixels):
            raise BadPicture(
                f"it takes too long to decode (a JPEG of {picture.width} x {picture.height} px in {len(scans)} scans)"
            )
    limit = max(MAX_BYTES, _BYTES_OF_A_PIXEL * max_pixels)
    if needed > limit:
        raise BadPicture(
            f"it takes too much memory to decode (a {picture.format} of {picture.width} x {picture.height} px: "
            f"{needed / 1e6:,.0f} MB, the limit is {limit / 1e6:,.0f} MB)"
        )


def _tile_pixels(picture: Image.Image) -> int:
    width, height = (picture.tag_v2.get(tag) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    return width * height if isinstance(width, int) and isinstance(height, int) else 0
