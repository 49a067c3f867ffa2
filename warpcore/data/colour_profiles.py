"""ICC profiles (ISO 15076-1): what the numbers of a picture mean, which networks are to see as sRGB.

Phones write Display P3, cameras and editors Adobe RGB: taken as sRGB, their pictures are pale. Print files are CMYK,
whose colours a formula without a profile misses by far.
"""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""The colours of a profile, as Pillow calls them."""
_DESCRIBED = {"RGB": ("L", "LA", "RGB", "RGBA"), "L": ("L", "LA"), "CMYK": ("CMYK",)}
"""The pictures whose profile it may be."""
_MAX_BYTES = 2**22
"""Of a profile; those of printers have about 2 MB."""
_AS_IT_IS = 2
"""Of 255: a profile that changes no colour by more says sRGB in other words."""


def in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture in L, LA, RGB, RGBA or CMYK, with the colours of sRGB by its profile; transparency stays.

    It is returned as it is where it has no profile, or one that is broken, of sRGB, or of other colours than its own.
    """
    transform = None if profile is None else _transform(profile)
    if transform is None or picture.mode not in _DESCRIBED[transform.input_mode]:
        return picture
    colours = ImageCms.applyTransform(picture.convert(transform.input_mode), transform)
    if picture.mode in ("LA", "RGBA"):
        colours.putalpha(picture.getchannel("A"))
    return colours


def pixels_in_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """The same for the pixels uint8 (H, W, 3) of an RGB picture, which are not copied where nothing is to be done."""
    if profile is None or _transform(profile) is None:
        return pixels
    return np.array(in_srgb(Image.fromarray(np.ascontiguousarray(pixels)), profile))


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """From the colours of a profile to those of sRGB; None where nothing is to be done."""
    mode = _MODES.get(profile[16:20])
    if mode is None or len(profile) > _MAX_BYTES:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        some = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        before = Image.fromarray(some).convert(mode)
        after = np.asarray(ImageCms.applyTransform(before, transform)).astype(int)
        if np.abs(after - np.asarray(before.convert("RGB"))).max() <= _AS_IT_IS:
            return None
    return transform
