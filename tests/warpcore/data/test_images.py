"""Any picture file to RGB at a bucket's size: geometry, fidelity, kinds of pictures, and files that are none."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import functional as vision

from tests.golden import load_case
from warpcore.data import images
from warpcore.data.buckets import Buckets, resized_size
from warpcore.data.images import CROPS, BadPicture, decode, decode_alike, place
from warpcore.errors import UserError

TOLERANCE = 1.5  # of 255: what DESIGN.md allows for resizing in uint8


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def textured(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth structure of several scales and a little noise, different in every corner."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(3, height, width)
    for cells, contrast in ((2, 60), (7, 40), (31, 15)):
        noise = torch.randn(1, 3, cells, cells, generator=generator) * contrast
        picture += torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0]
    picture += 128 + 2 * torch.randn(3, height, width, generator=generator)
    return Image.fromarray(picture.clip(0, 255).byte().permute(1, 2, 0).numpy())


def in_floats(picture: Image.Image, size: tuple[int, int], geometry) -> np.ndarray:
    """The same operation by torchvision, in float32: (H, W, 3)."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()
    resized = vision.resize(pixels, list(resized_size(picture.height, picture.width, size)), antialias=True)
    return vision.crop(resized, geometry.top, geometry.left, *size).permute(1, 2, 0).numpy()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / (((one.astype(float) - other) ** 2).mean() + 1e-9))


# Geometry


def test_pixels_are_those_of_the_reference():
    golden, tensors = load_case("bucketeer_batches")
    buckets = Buckets(golden["density"], golden["factor"], golden["ratios"])
    for batch in golden["batches_in_order"]:
        for number, expected in zip(batch["picture_numbers"], tensors[batch["images"]], strict=True):
            picture = Image.fromarray(tensors[f"in.picture_{number}"].permute(1, 2, 0).numpy())
            pixels = decode(encoded(picture), buckets.choose(*picture.size, seed=0)).pixels
            assert pixels.dtype == np.uint8
            assert np.abs(pixels - 255 * expected.permute(1, 2, 0).numpy()).max() < TOLERANCE


sides = st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 2000]))
bucket_sides = st.integers(1, 40).map(lambda n: 4 * n)


@settings(deadline=None, max_examples=60)
@given(sides, sides, bucket_sides, bucket_sides, st.sampled_from(CROPS), st.booleans(), st.integers(0, 2**63 - 1))
def test_every_picture_comes_out_at_its_buckets_size(height, width, rows, columns, crop, as_jpeg, seed):
    picture = Image.new("RGB", (width, height), (10, 200, 90))
    data = encoded(picture, "JPEG" if as_jpeg else "PNG")
    pixels, geometry = decode(data, (rows, columns), crop, seed)
    assert pixels.shape == (rows, columns, 3)
    assert np.abs(pixels.astype(int) - (10, 200, 90)).max() <= 3
    left, top, right, bottom = geometry.box
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((301, 203), (96, 64)),
        ((203, 301), (64, 64)),
        ((90, 700), (64, 64)),
        ((700, 90), (32, 64)),
        ((40, 61), (96, 96)),
    ],
)
def test_resizing_agrees_with_floats(source, size, crop):
    picture = textured(*source)
    pixels, geometry = decode(encoded(picture), size, crop, seed=3)
    assert np.abs(pixels - in_floats(picture, size, geometry)).max() < TOLERANCE


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 96), (200, 300)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(textured(240, 310), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    pixels, geometry = decode(data, size)
    assert geometry.source == upright.size[::-1]
    assert psnr(pixels, in_floats(upright, size, geometry)) > 38
    in_png, _ = decode(encoded(Image.open(BytesIO(data)), "PNG", exif=exif), size)
    assert np.abs(in_png - in_floats(upright, size, geometry)).max() < TOLERANCE


def test_a_random_crop_depends_on_the_seed_alone_and_reaches_everywhere():
    tops = [place((300, 100), (100, 100), "random", seed).top for seed in range(2000)]
    assert tops == [place((300, 100), (100, 100), "random", seed).top for seed in range(2000)]
    assert set(tops) == set(range(201))
    assert np.mean(tops) == pytest.approx(100, abs=4)


@pytest.mark.parametrize("detail_at", [0, 100, 200])
@pytest.mark.parametrize("turned", [False, True])
def test_a_smart_crop_keeps_the_most_detailed_region(detail_at, turned):
    pixels = np.full((300, 100, 3), 90, np.uint8)
    pixels[detail_at : detail_at + 100] = np.random.default_rng(0).integers(0, 256, (100, 100, 3))
    picture = Image.fromarray(pixels.swapaxes(0, 1) if turned else pixels)
    geometry = decode(encoded(picture), (100, 100), "smart").geometry
    assert (geometry.left if turned else geometry.top) == pytest.approx(detail_at, abs=4)


def test_a_smart_crop_of_a_flat_picture_is_the_centre():
    geometry = decode(encoded(Image.new("RGB", (300, 100))), (100, 100), "smart").geometry
    assert (geometry.top, geometry.left) == (0, 100)


def test_an_unknown_crop_is_an_error_that_names_the_known_ones():
    with pytest.raises(UserError, match="center, random, smart"):
        decode(encoded(textured(8, 8)), (8, 8), "clever")


@pytest.mark.parametrize("size", [(64, 80), (64, 48)], ids=["half is kept", "less is kept"])
@pytest.mark.parametrize("scale", [1, 0.5, 1.7])
def test_a_companion_picture_gets_the_same_crop_at_any_resolution(scale, size):
    picture = textured(200, 500)
    companion = picture.resize((round(500 * scale), round(200 * scale)), Image.Resampling.BICUBIC)
    pixels, geometry = decode(encoded(picture), size, "random", seed=11)
    assert psnr(decode_alike(encoded(companion), geometry), pixels) > 33
    with pytest.raises(BadPicture, match="500 x 300 px is not the shape of its picture, 500 x 200"):
        decode_alike(encoded(textured(300, 500)), geometry)


# Scaled decoding


@pytest.mark.parametrize(("side", "reduction"), [(512, 2), (270, 4), (130, 8)])
def test_a_large_jpeg_is_decoded_scaled_with_high_fidelity(side, reduction):
    picture = textured(1100, 1301)
    data = encoded(picture, "JPEG", quality=90)
    pixels, geometry = decode(data, (side, side))
    expected = in_floats(Image.open(BytesIO(data)), (side, side), geometry)
    assert min(geometry.source) // min(geometry.resized) >= reduction
    assert np.abs(pixels - expected).max() > TOLERANCE, "it was decoded whole"
    assert psnr(pixels, expected) > 42


def test_scaled_decoding_does_not_shift_a_picture_of_odd_size():
    x = np.arange(521)
    wave = np.broadcast_to((128 + 90 * np.sin(2 * np.pi * x / 128))[None, :, None], (521, 521, 3)).astype(np.uint8)
    picture = Image.fromarray(wave)
    pixels, geometry = decode(encoded(picture, "JPEG", quality=100, subsampling=0), (64, 64))
    # 521 px are 66 blocks, the last one 1 px wide: stretched over the bucket as if it were whole, it shifts by 0.9 px.
    assert np.abs(pixels - in_floats(picture, (64, 64), geometry))[:, 2:-2].max() < 2.5


@settings(max_examples=60)
@given(
    sides=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    target=st.integers(8, 64),
    mode=st.sampled_from(["RGB", "L"]),
    options=st.fixed_dictionaries(
        {"quality": st.integers(1, 100), "progressive": st.booleans(), "subsampling": st.sampled_from([0, 1, 2])}
    ),
    kept=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
)
def test_both_jpeg_decoders_give_the_same_pixels(sides, target, mode, options, kept):
    data = encoded(textured(*sides).convert(mode), "JPEG", **options)
    data = data[: round(kept * (len(data) - 2))] + data[-2:]  # with its end marker, which is looked for before
    results = []
    for decoder in (images.simplejpeg, None):
        with pytest.MonkeyPatch.context() as patch, suppress(BadPicture):
            patch.setattr(images, "simplejpeg", decoder)
            if decoder is not None and kept == 1:
                patch.setattr(images.cv2, "imdecode", None)  # only damaged data is left to OpenCV
            results.append(decode(data, (target, target)).pixels)
    assert images.simplejpeg is not None
    assert len(results) != 1
    if results:
        np.testing.assert_array_equal(*results)


# Kinds of pictures

ORANGE = (250, 120, 30)


def _palette_with_transparency() -> bytes:
    picture = Image.new("P", (40, 30), 1)
    picture.putpalette([0, 0, 0, *ORANGE])
    picture.paste(0, (20, 0, 40, 30))
    return encoded(picture, transparency=0)


def _sixteen_bit_with_transparency() -> bytes:
    """One grey is transparent (tRNS), and not the one that is the same in 8 bits."""
    grey = np.full((30, 40), 149 * 257, np.uint16)
    grey[:, 20:] += 60
    return encoded(Image.fromarray(grey), transparency=149 * 257 + 60)


def _half_transparent(mode: str, kind: str, **options) -> bytes:
    picture = Image.new("RGBA", (40, 30), (*ORANGE, 255))
    picture.paste((77, 77, 77, 0), (20, 0, 40, 30))
    return encoded(picture.convert(mode), kind, **options)


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), color) for color in (ORANGE, "blue", "white")]
    return encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


def _sixteen_bit(byte_order: str = "") -> bytes:
    return encoded(Image.fromarray(np.full((30, 40), 200 * 257, np.uint16)), "TIFF" if byte_order else "PNG")


SOLID = {
    "jpeg": (lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "JPEG", quality=98, subsampling=0), ORANGE),
    "progressive": (
        lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "JPEG", quality=98, subsampling=0, progressive=True),
        ORANGE,
    ),
    "webp": (lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "WEBP", lossless=True), ORANGE),
    "bmp": (lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "BMP"), ORANGE),
    "tiff": (lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "TIFF"), ORANGE),
    "gif": (lambda: encoded(Image.new("RGB", (40, 30), ORANGE), "GIF"), ORANGE),
    "grey": (lambda: encoded(Image.new("L", (40, 30), 140)), (140, 140, 140)),
    "grey jpeg": (lambda: encoded(Image.new("L", (40, 30), 140), "JPEG"), (140, 140, 140)),
    "one bit": (lambda: encoded(Image.new("1", (40, 30), 1)), (255, 255, 255)),
    "16 bit png": (_sixteen_bit, (200, 200, 200)),
    "16 bit tiff": (lambda: _sixteen_bit("<"), (200, 200, 200)),
    # Photoshop's convention: a CMYK JPEG with an Adobe marker is stored inverted. (255 - c)(255 - k) / 255
    "cmyk jpeg": (lambda: encoded(Image.new("CMYK", (40, 30), (0, 102, 204, 51)), "JPEG", quality=98), (204, 122, 41)),
    "cmyk tiff": (lambda: encoded(Image.new("CMYK", (40, 30), (0, 102, 204, 51)), "TIFF"), (204, 122, 41)),
    "animated webp": (lambda: _animated("WEBP"), ORANGE),
    "animated gif": (lambda: _animated("GIF"), ORANGE),
    "animated png": (lambda: _animated("PNG"), ORANGE),
}


@pytest.mark.parametrize("kind", SOLID)
def test_every_kind_of_picture_becomes_rgb(kind):
    make, expected = SOLID[kind]
    pixels = decode(make(), (24, 32)).pixels
    assert np.abs(pixels.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("make", "solid"),
    [
        (_palette_with_transparency, ORANGE),
        (lambda: _half_transparent("RGBA", "PNG"), ORANGE),
        (lambda: _half_transparent("RGBA", "WEBP", lossless=True), ORANGE),
        (lambda: _half_transparent("LA", "PNG"), (149, 149, 149)),
        (_sixteen_bit_with_transparency, (149, 149, 149)),
    ],
    ids=["palette", "png", "webp", "grey", "grey of 16 bits"],
)
def test_transparent_pixels_show_the_background(make, solid):
    pixels = decode(make(), (30, 40), background=(0, 60, 255)).pixels.astype(int)
    assert np.abs(pixels[:, :18] - solid).max() <= 2
    assert np.abs(pixels[:, 22:] - (0, 60, 255)).max() <= 2


# No pictures


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_a_bad_picture(side):
    with pytest.raises(BadPicture, match=r"(?i)limit of|decompression bomb"):
        decode(_png_that_claims(side, side), (64, 64))


def test_the_limit_of_pixels_is_a_setting():
    data = encoded(textured(100, 101))
    assert decode(data, (64, 64), max_pixels=10_100).pixels.shape == (64, 64, 3)
    with pytest.raises(BadPicture, match=r"more than the limit of 10099 pixels \(101 x 100 px\)"):
        decode(data, (64, 64), max_pixels=10_099)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.3, 0.9, -2, -30])
def test_a_jpeg_that_is_cut_off_is_a_bad_picture(kept, progressive):
    # An end marker in a comment, as thumbnails have one, must not pass for the picture's own.
    data = encoded(textured(200, 300), "JPEG", progressive=progressive, comment=b"\xff\xd9")
    with pytest.raises(BadPicture, match="cut off"):
        decode(data[: int(len(data) * kept) if kept > 0 else kept], (64, 64))
    assert decode(data + b"what cameras append", (64, 64))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_files_that_are_cut_off_are_bad_pictures(kind):
    data = encoded(textured(200, 300), kind)
    with pytest.raises(BadPicture):
        decode(data[: len(data) // 2], (64, 64))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", r"no picture in a known format .*<html>40"),
        # Pillow would start Ghostscript for this one.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF", "no picture in a known format"),
    ],
)
def test_what_is_no_picture_says_what_it_is(data, reason):
    with pytest.raises(BadPicture, match=reason):
        decode(data, (64, 64))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), st.integers(0, 2**32))
def test_damaged_bytes_give_pixels_or_a_bad_picture_and_nothing_else(kind, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(textured(60, 80), kind))
    for position in rng.integers(0, len(data), 8):
        data[position] = rng.integers(256)
    with suppress(BadPicture):
        assert decode(bytes(data), (32, 40)).pixels.shape == (32, 40, 3)
