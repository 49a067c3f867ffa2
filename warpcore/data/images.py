"""Pictures: the bytes of any picture file to RGB pixels at a bucket's size, in one decode and one resize.

The picture is resized, with bilinear anti-aliasing on uint8, to the smallest size that covers the bucket and then
cropped. Results are within 1.5/255 of the same operation in floats. Colours of a picture with an ICC profile become
those of sRGB. A JPEG at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 of its size, straight from its
DCT coefficients: much faster, and about 40 dB PSNR or better against decoding it whole (`benchmarks/data.py` measures
both).
"""

from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from warpcore.data import jpeg_scans
from warpcore.data.buckets import resized_size
from warpcore.data.colour_profiles import in_srgb, pixels_in_srgb
from warpcore.data.picture_costs import (
    MAX_PIXELS,
    BadPicture,
    CountedFile,
    check_memory,
    check_pixels,
    check_tags,
    check_time,
    orientation,
)
from warpcore.data.samples import FORMATS
from warpcore.errors import UserError
from warpcore.quiet import ignore_expected_warnings
from warpcore.random import stable_hash

try:
    import simplejpeg
except ImportError:  # OpenCV does the same, slower
    simplejpeg = None

ignore_expected_warnings()

Crop = Literal["center", "random", "smart"]
CROPS: tuple[str, ...] = get_args(Crop)

_STRIP_PIXELS = 2**22
"""A larger picture becomes RGB in strips: the steps to it take several times its memory."""

_UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
_REDUCED = {
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    1: 0,
}
_DETAIL_SIDE = 128  # longer side in px of the small grey picture that `smart` looks at
_KEPT_LEAST = 0.5  # a crop that keeps less than this of the resized picture resizes only what it keeps


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an upright picture came to its bucket: resized as a whole, then cropped. Sizes are (H, W) in px."""

    source: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    """Of the crop, in the resized picture."""
    size: tuple[int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop in pixels of the upright source."""
        y, x = (whole / resized for whole, resized in zip(self.source, self.resized, strict=True))
        return self.left * x, self.top * y, (self.left + self.size[1]) * x, (self.top + self.size[0]) * y


class Picture(NamedTuple):
    """Pixels uint8 (H, W, 3) at the bucket's size, possibly a view with strides, and where they come from."""

    pixels: np.ndarray
    geometry: Geometry


class Stored(NamedTuple):
    """Pixels (h, w, 3) uint8 as they lie in the file, `reduction` times smaller; `size` is the full upright (H, W).
    `profile` is what their colours are still to be converted by."""

    pixels: np.ndarray
    size: tuple[int, int]
    orientation: int = 1
    reduction: int = 1
    profile: bytes | None = None


def decode(
    data: bytes,
    size: tuple[int, int],
    crop: Crop = "center",
    seed: int = 0,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """The picture in `data` as RGB at the bucket `size` (H, W).

    crop: `center`, `random` (the seed decides) or `smart`, which keeps the window of the largest summed gradient
    magnitude of a small grey version. background: RGB that shows through transparent pixels. An animation gives its
    first frame. Raises BadPicture where the bytes are no picture, are cut off, or hold more than `max_pixels`.
    """
    stored = _read(data, size, background, max_pixels)
    geometry = place(stored.size, size, crop, seed, stored)
    return Picture(pixels_in_srgb(_resample(stored, geometry), stored.profile), geometry)


def decode_alike(
    data: bytes, geometry: Geometry, background: tuple[int, int, int] = (0, 0, 0), max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A picture that belongs to another (a mask, a depth map), with that one's crop: uint8 (H, W, 3).

    Its numbers are no colours, and stay as they are. It may have another resolution; raises BadPicture too where its
    shape differs by more than one percent.
    """
    stored = _read(data, geometry.resized, background, max_pixels, colours=False)
    (height, width), (its_height, its_width) = geometry.source, stored.size
    if abs(height * its_width - width * its_height) > 0.01 * height * its_width + max(height, width):
        raise BadPicture(f"{its_width} x {its_height} px is not the shape of its picture, {width} x {height} px")
    return _resample(stored, geometry)


def place(
    source: tuple[int, int], size: tuple[int, int], crop: Crop = "center", seed: int = 0, stored: Stored | None = None
) -> Geometry:
    """The crop of an upright picture of `source` (H, W) px to the bucket `size`; `smart` needs the pixels."""
    resized = resized_size(*source, size)
    free = resized[0] - size[0], resized[1] - size[1]
    if crop == "center":
        top, left = round(free[0] / 2), round(free[1] / 2)
    elif crop == "random":
        top, left = stable_hash(seed, "crop top") % (free[0] + 1), stable_hash(seed, "crop left") % (free[1] + 1)
    elif crop == "smart":
        if stored is None:
            raise ValueError("a smart crop looks at the picture: give its pixels")
        top, left = _most_detailed(stored, resized, size)
    else:
        raise UserError(f"crop_mode is {crop!r}; it is one of {', '.join(CROPS)}")
    return Geometry(source, resized, top, left, size)


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of an upright picture, which can be decoded to its end; raises BadPicture as `decode` does."""
    return _read(data, (1, 1), (0, 0, 0), max_pixels, colours=False).size


def num_frames(data: bytes) -> int:
    """How many frames an animated picture has, of which `decode` gives the first; 1 of any other picture.

    Raises:
        BadPicture: the bytes are no picture.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # MPO has views of one moment
    except Exception as error:  # see `_read`
        raise BadPicture(_reason(error, data)) from error


def _read(
    data: bytes, size: tuple[int, int], background: tuple[int, int, int], max_pixels: int, colours: bool = True
) -> Stored:
    """Decode; a JPEG no larger than covering the bucket `size` needs. Without `colours`, profiles are passed over."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow has a guard of its own, and the caller asks for a wider one
    try:
        check_tags(file := CountedFile(BytesIO(data)))
        picture = Image.open(file, formats=FORMATS)
        check_pixels(picture, max_pixels)
        if not colours:
            picture.info.pop("icc_profile", None)
        if picture.format in ("JPEG", "MPO"):
            return _read_jpeg(data, picture, size, background, max_pixels)
        check_memory(picture, max_pixels)
        check_time(picture, len(data))
        return _read_any(picture, background)
    except (BadPicture, MemoryError):
        raise
    # Pillow's readers meet broken bytes with exceptions of many kinds. All bytes are in memory: none is an I/O fault.
    except Exception as error:
        raise BadPicture(_reason(error, data)) from error


def _read_jpeg(
    data: bytes, header: Image.Image, size: tuple[int, int], background: tuple[int, int, int], max_pixels: int
) -> Stored:
    """`header` is the opened, undecoded picture."""
    scans = jpeg_scans.check(data, header)
    if header.mode not in ("L", "RGB"):
        check_memory(header, max_pixels, scans=scans.found)
        stored = _read_any(header, background)
        last = header.getpixel((header.width - 1, header.height - 1))
    else:
        turned = orientation(header)
        upright = header.size if turned >= 5 else header.size[::-1]
        resized = resized_size(*upright, size)
        reduction = next((k for k in (8, 4, 2) if upright[0] >= k * resized[0] and upright[1] >= k * resized[1]), 1)
        check_memory(header, max_pixels, scans=scans.found, reduction=reduction)
        pixels = _jpeg_pixels(data, header.size, reduction)
        if pixels is None or pixels.shape[:2] != (-(-header.height // reduction), -(-header.width // reduction)):
            raise BadPicture("the JPEG's data is damaged")
        profile = header.info.get("icc_profile")
        if header.mode == "L" and profile is not None:
            pixels = np.array(in_srgb(Image.fromarray(pixels[..., 0]), profile).convert("RGB"))
            profile = None
        stored = Stored(pixels, upright, turned, reduction, profile)
        last = pixels[-1, -1]
    if all(value in jpeg_scans.GREY for value in last) and jpeg_scans.ran_out(data, scans):
        raise BadPicture("the JPEG is cut off: its data ends before the picture does, of which the rest would be grey")
    return stored


def _jpeg_pixels(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """RGB (h, w, 3) of a JPEG of `size` (W, H) at 1/`reduction`, as it lies in the file; None where it is damaged.

    Both decoders are libjpeg-turbo and give the same pixels. simplejpeg writes them straight to where they stay, a
    tenth faster, and refuses damaged data, of which OpenCV makes what can be made.
    """
    if simplejpeg is not None:
        width, height = (-(-side // reduction) if reduction > 1 else 0 for side in size)
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[reduction]
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def _read_any(picture: Image.Image, background: tuple[int, int, int]) -> Stored:
    picture.load()
    if picture.mode == "P" and picture.has_transparency_data:
        _blend_palette(picture, background)
        picture.info.pop("icc_profile", None)  # its colours are converted
    turned = orientation(picture)
    (width, height), depth = picture.size, max(1, _STRIP_PIXELS // picture.width)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, depth):
        rows = min(depth, height - top)
        strip = picture if rows == height else picture.crop((0, top, width, top + rows))
        pixels[top : top + rows] = np.asarray(_to_rgb(strip, background))
    if turned != 1:
        pixels = np.ascontiguousarray(_UPRIGHT[turned](pixels))
    return Stored(pixels, pixels.shape[:2])


def _blend_palette(picture: Image.Image, background: tuple[int, int, int]) -> None:
    """Make a loaded picture with a palette opaque: 256 colours are blended, not every pixel."""
    colours = picture.resize((256, 1), Image.Resampling.NEAREST, box=(0, 0, 1, 1))
    colours.frombytes(bytes(range(256)))  # a pixel of each
    picture.putpalette(_to_rgb(colours, background).tobytes())
    picture.info.pop("transparency", None)


def _to_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        # 16 bit grey, in whichever byte order: Pillow's own conversion would clip it at 255.
        grey = np.clip(np.asarray(picture).astype(np.int32), 0, 65535)
        clear = picture.info.get("transparency")  # the grey that is transparent, of a PNG
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        if isinstance(clear, int):
            picture.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    elif picture.mode == "F":
        raise BadPicture("its samples are floats, of which nobody knows the range")
    if picture.has_transparency_data:
        picture = in_srgb(picture.convert("LA" if picture.mode == "LA" else "RGBA"), profile).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture)
    else:
        picture = in_srgb(picture if picture.mode in ("L", "CMYK") else picture.convert("RGB"), profile)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _resample(stored: Stored, geometry: Geometry) -> np.ndarray:
    """Resize the stored pixels as `geometry` says, turn them upright and crop: (H, W, 3)."""
    upright = _UPRIGHT[stored.orientation]
    (height, width), (rows, columns) = geometry.size, geometry.resized
    if height * width < _KEPT_LEAST * rows * columns:
        return _resample_crop(stored, geometry)
    turned = slice(None, None, -1 if stored.orientation >= 5 else 1)
    target, whole = geometry.resized[turned], stored.size[turned]
    # A reduced picture's last row may stand for less than a row: scale by the true size, not by the rows there are.
    # That meets the target but for rounding, which the last factor settles, and surplus rows, which are cut off.
    scale = tuple(t / s * stored.reduction * (1 + 1e-9) for t, s in zip(target, whole, strict=True))
    pixels = torch.from_numpy(stored.pixels).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    resized = upright(resized.numpy()[: target[0], : target[1]])
    return resized[geometry.top : geometry.top + height, geometry.left : geometry.left + width]


def _resample_crop(stored: Stored, geometry: Geometry) -> np.ndarray:
    """The same where little is kept: slower per pixel, but computes only what is kept."""
    pixels = _UPRIGHT[stored.orientation](stored.pixels)
    y, x = (own / whole / stored.reduction for own, whole in zip(stored.size, geometry.source, strict=True))
    left, top, right, bottom = (side * scale for side, scale in zip(geometry.box, (x, y, x, y), strict=True))
    box = (left, top, min(right, pixels.shape[1]), min(bottom, pixels.shape[0]))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize(geometry.size[::-1], Image.Resampling.BILINEAR, box=box))


def _most_detailed(stored: Stored, resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of the window `size` of the resized picture with most gradient magnitude; of equals the middle."""
    height, width = stored.pixels.shape[:2]
    shrink = min(1.0, _DETAIL_SIDE / max(height, width))
    small = cv2.resize(
        stored.pixels, (max(1, round(width * shrink)), max(1, round(height * shrink))), interpolation=cv2.INTER_AREA
    )
    grey = _UPRIGHT[stored.orientation](small).mean(axis=2)
    detail = np.abs(np.diff(grey, axis=0, prepend=grey[:1])) + np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    top, left = (
        _best_window(detail.sum(axis=1 - axis), whole=resized[axis], window=size[axis]) for axis in (0, 1)
    )  # fmt: skip
    return top, left


def _best_window(profile: np.ndarray, whole: int, window: int) -> int:
    """The start, in px of `whole`, of the `window` px over which `profile`, stretched over `whole`, sums to most."""
    free = whole - window
    starts = np.unique(np.linspace(0, free, min(free, 1024) + 1).round().astype(np.int64))
    edges, total = np.linspace(0, whole, len(profile) + 1), np.concatenate([[0.0], np.cumsum(profile)])
    sums = np.interp(starts + window, edges, total) - np.interp(starts, edges, total)
    best = starts[sums >= sums.max() - 1e-9 * total[-1]]
    return int(best[np.argmin(np.abs(best - free / 2))])


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is no picture in a known format ({', '.join(FORMATS)}); it begins with {data[:8]!r}"
    return f"{error or type(error).__name__}"
