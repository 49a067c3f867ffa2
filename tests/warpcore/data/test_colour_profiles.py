"""Pictures with ICC profiles: networks see their colours in sRGB, whatever the file's numbers mean.

Sources: kohya-ss/sd-scripts#2179, Comfy-Org/ComfyUI#11240, bghira/SimpleTuner#1765.
"""

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tests.bounds import bounded, fuzz
from warpcore.data.images import decode, decode_alike, place

SIZE = (16, 16)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
"""Columns: XYZ of red, green and blue, relative to the white of profiles (D50)."""


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile, version 2.4."""
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    white = fixed(0.9642, 1.0, 0.8249)
    header = bytes(8) + struct.pack(">I", 0x02400000) + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    header += white + bytes(48)
    return struct.pack(">I", len(header) + len(table) + len(body)) + header[4:] + table + body


def fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def curve(values: list[int]) -> bytes:
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *values)


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB's numbers in [0, 1] to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def as_numbers(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def with_primaries(primaries: np.ndarray) -> bytes:
    """A profile of these primaries and sRGB's curve."""
    response = curve([round(65535 * value) for value in linear(np.linspace(0, 1, 1024))])
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), response)
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True):
        tags[name] = b"XYZ " + bytes(4) + fixed(*column)
    return profile(b"RGB ", tags)


P3 = with_primaries(DISPLAY_P3)
LINEAR_GREY = profile(b"GRAY", {b"kTRC": curve([])})


def cmyk_profile() -> bytes:
    """Of a printer whose colours, as Lab, are those of two points per ink, mixed linearly: cyan is (55, -37, -50)."""
    identity = bytes(range(256))
    inks = {0: (55, -37, -50), 1: (48, 74, -3), 2: (89, -5, 93), 3: (0, 0, 0)}
    points = []
    for number in range(16):
        used = [inks[i] for i in range(4) if number >> (3 - i) & 1]
        light, a, b = np.mean(used, axis=0) if used else (100, 0, 0)
        points += [round(light * 2.55), round(a) + 128, round(b) + 128]
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += identity * 4 + bytes(points) + identity * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, b"Lab ", b"prtr")


def encoded(picture: Image.Image, kind: str, icc: bytes | None, **options) -> bytes:
    file = BytesIO()
    picture.save(file, kind, icc_profile=icc, **options)
    return file.getvalue()


def colour(data: bytes, **options) -> list[int]:
    return decode(data, SIZE, **options).pixels[8, 8].tolist()


def in_srgb(numbers: tuple[int, int, int]) -> np.ndarray:
    """Numbers of Display P3 as numbers of sRGB, without a library."""
    light = np.linalg.inv(SRGB) @ DISPLAY_P3 @ linear(np.array(numbers) / 255)
    return 255 * as_numbers(light)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("numbers", [(200, 80, 60), (90, 160, 120), (128, 128, 128)])
def test_a_picture_of_a_phone_has_the_colours_that_it_shows(kind, numbers):
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = colour(encoded(Image.new("RGB", (64, 48), numbers), kind, P3, **options))
    assert np.abs(found - in_srgb(numbers)).max() <= 2.5


def test_a_reduced_and_a_turned_jpeg_too():
    numbers, exif = (200, 80, 60), Image.Exif()
    exif[0x112] = 6
    found = colour(encoded(Image.new("RGB", (400, 300), numbers), "JPEG", P3, exif=exif, quality=100))
    assert np.abs(found - in_srgb(numbers)).max() <= 2.5


def test_palettes_and_transparency():
    numbers = (200, 80, 60)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, *numbers])
    assert np.abs(colour(encoded(palette, "PNG", P3)) - in_srgb(numbers)).max() <= 2.5
    assert np.abs(colour(encoded(palette, "PNG", P3, transparency=0)) - in_srgb(numbers)).max() <= 2.5
    opaque, clear = (Image.new("RGBA", (32, 32), (*numbers, alpha)) for alpha in (255, 0))
    assert np.abs(colour(encoded(opaque, "PNG", P3)) - in_srgb(numbers)).max() <= 2.5
    assert colour(encoded(clear, "PNG", P3), background=(10, 200, 30)) == [10, 200, 30]  # which is sRGB


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_grey_pictures_with_a_grey_profile(kind):
    expected = round(255 * float(as_numbers(np.array(55 / 255))))
    assert np.abs(np.array(colour(encoded(Image.new("L", (32, 32), 55), kind, LINEAR_GREY))) - expected).max() <= 1
    if kind == "PNG":
        found = colour(encoded(Image.new("LA", (32, 32), (55, 255)), kind, LINEAR_GREY))
        assert np.abs(np.array(found) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_picture_for_print_has_the_colours_of_its_inks(kind):
    icc = cmyk_profile()
    data = encoded(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), kind, icc)
    shown = ImageCms.ImageCmsProfile(BytesIO(icc))
    expected = ImageCms.profileToProfile(
        Image.new("CMYK", (1, 1), (255, 0, 0, 0)), shown, ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    ).getpixel((0, 0))  # fmt: skip
    assert np.abs(np.array(colour(data)) - expected).max() <= 2
    assert colour(data)[1] > 100  # not (0, 255, 255), nor black
    assert abs(colour(data)[1] - 255) > 60


def test_profiles_of_srgb_broken_ones_and_those_of_other_colours_change_nothing():
    numbers = (200, 80, 60)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (None, srgb, with_primaries(SRGB), b"no profile", P3[:200], LINEAR_GREY, cmyk_profile()):
        assert colour(encoded(Image.new("RGB", (32, 32), numbers), "PNG", icc)) == list(numbers)


def test_masks_and_maps_are_numbers_not_colours():
    data = encoded(Image.new("RGB", (32, 32), (200, 80, 60)), "PNG", P3)
    assert decode_alike(data, place((32, 32), SIZE))[8, 8].tolist() == [200, 80, 60]
    jpeg = encoded(Image.new("L", (32, 32), 55), "JPEG", LINEAR_GREY)
    assert decode_alike(jpeg, place((32, 32), SIZE))[8, 8].tolist() == [55, 55, 55]


places = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8)


@fuzz(50)
@given(st.sampled_from(["RGB", "CMYK"]), places)
def test_hostile_profiles_are_read_in_bounds(tmp_path_factory, mode, changes):
    icc = bytearray(P3 if mode == "RGB" else cmyk_profile())
    for byte, value in changes:
        icc[byte % len(icc)] = value
    data = encoded(Image.new(mode, (32, 32)), "JPEG", bytes(icc))
    with bounded(tmp_path_factory.getbasetemp()):
        assert decode(data, SIZE).pixels.shape == (*SIZE, 3)
