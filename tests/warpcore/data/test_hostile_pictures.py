"""Pictures that nobody meant: far more expensive than their files are large, cut off, or damaged in any place."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from families.common.pictures import read_picture
from tests.bounds import bounded, fuzz
from tests.tiers import represented_by
from tests.warpcore.data.test_images import encoded, textured
from tools.build_dataset import build_dataset
from warpcore.data.images import BadPicture, check, decode, decode_alike, place
from warpcore.data.member_headers import picture_size
from warpcore.errors import UserError

SIZE, END = (64, 64), b"\xff\xd9"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def palette_png(side: int) -> bytes:
    """One colour, transparent: a byte for each pixel, which was a dozen on its way to RGB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 3, 0, 0, 0))
    colours = _chunk(b"PLTE", bytes(3)) + _chunk(b"tRNS", b"\0")
    return b"\x89PNG\r\n\x1a\n" + header + colours + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def webp(side: int) -> bytes:
    """Lossless, of one colour: its codes are of no bits, so that the size in the header is all there is."""
    data = bytearray(encoded(Image.new("RGB", (16, 16), (1, 2, 3)), "WEBP", lossless=True))
    (bits,) = struct.unpack_from("<I", data, 21)
    struct.pack_into("<I", data, 21, bits & ~(2**28 - 1) | (side - 1) << 14 | (side - 1))
    return bytes(data)


def qoi(side: int) -> bytes:
    return b"qoif" + struct.pack(">IIBB", side, side, 3, 0) + b"\xfd" * (side * side // 62 + 1) + bytes(7) + b"\1"


def qoi_of_differences(side: int) -> bytes:
    """A byte for each pixel, which Pillow reads in Python."""
    return b"qoif" + struct.pack(">IIBB", side, side, 3, 0) + b"\x6b" * (side * side) + bytes(7) + b"\1"


def bmp_of_empty_rows(side: int) -> bytes:
    """Rows that end after their first pixel: four bytes each."""
    rows = b"\1\5\0\0" * side
    headers = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(headers) + len(rows), 0, 0, 14 + len(headers)) + headers + rows


def ppm(side: int, most: int = 254) -> bytes:
    return b"P6\n%d %d\n%d\n" % (side, side, most) + bytes(3 * side * side)


def tiff_of_strips(side: int, count: int) -> bytes:
    """Grey, in strips of which each two are the whole picture, again and again."""
    pixels, places = bytes(side * side), struct.pack("<2I", 8, 8 + side * side // 2) * (count // 2)
    start = 8 + len(pixels)
    entries = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 278: side // 2}
    tags = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()]
    tags.insert(5, struct.pack("<HHII", 273, 4, count, start))
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", start + len(places)) + pixels + places + directory


def jpeg_of_many_scans(side: int, count: int = 300) -> bytes:
    data = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4") : -2]  # the last scan with its table
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + END


def jpeg_that_claims(side: int, **options) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (16, 16), (9, 90, 200)), "JPEG", **options))
    struct.pack_into(">HH", data, data.find(b"\xff\xc2" if "progressive" in options else b"\xff\xc0") + 5, side, side)
    return bytes(data)


def png_of_chunks(kind: bytes, content: bytes, count: int, first: bool) -> bytes:
    """With chunks before its pixels, or between them."""
    data, chunks = encoded(textured(20, 30)), _chunk(kind, content) * count
    at = data.index(b"IDAT") - 4 if first else data.index(b"IEND") - 4
    return data[:at] + chunks + data[at:]


def jpeg_of_segments(segment: bytes, count: int, **options) -> bytes:
    data = encoded(textured(20, 30), "JPEG", **options)
    return data[:2] + segment * count + data[2:]


def tables_between_scans(count: int) -> bytes:
    data = encoded(textured(20, 30), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + b"\xff\xfe\0\2" * count + data[at:]


def gif_of_blocks(block: bytes, count: int) -> bytes:
    data = encoded(textured(20, 30).quantize(256), "GIF")
    return data[: 13 + 768] + block * count + data[13 + 768 :]


DAMAGED_TEXT = b"a\0\0" + zlib.compress(bytes(10**6))[:-4] + b"adlr"

MANY_PARTS = {
    "png, empty pixels": lambda: png_of_chunks(b"IDAT", b"", 2**19, first=False),
    "png, empty pixels first": lambda: png_of_chunks(b"IDAT", b"", 2**19, first=True),
    "png, unknown": lambda: png_of_chunks(b"prVt", b"", 2**19, first=True),
    "png, unknown behind": lambda: png_of_chunks(b"prVt", b"", 2**19, first=False),
    "png, text": lambda: png_of_chunks(b"tEXt", b"a\0", 2**19, first=True),
    "png, profiles": lambda: png_of_chunks(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)), 2000, first=True),
    "png, damaged text": lambda: png_of_chunks(b"zTXt", DAMAGED_TEXT, 2000, first=True),
    "jpeg, comments": lambda: jpeg_of_segments(b"\xff\xfe\0\2", 2**19),
    "jpeg, few comments": lambda: jpeg_of_segments(b"\xff\xfe\0\2", 2**16),
    "jpeg, exif": lambda: jpeg_of_segments(b"\xff\xe1\0\x08Exif\0\0", 2**19),
    "jpeg, filled up": lambda: jpeg_of_segments(b"\xff", 2**20),
    "jpeg, between scans": lambda: tables_between_scans(2**19),
    "gif, comments": lambda: gif_of_blocks(b"\x21\xfe\1a\0", 2**19),
    "gif, loops": lambda: gif_of_blocks(b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0", 2**19),
    "ppm, comments": lambda: b"P6\n" + b"#\n" * 2**19 + b"8 8\n255\n" + bytes(192),
}


@pytest.mark.parametrize("kind", represented_by("png, empty pixels", "jpeg, few comments", of=MANY_PARTS))
def test_millions_of_parts_are_a_bad_picture(tmp_path, kind):
    data = MANY_PARTS[kind]()
    with bounded(tmp_path, seconds=4), pytest.raises(BadPicture, match=r"too many parts|more than 10,000 segments"):
        decode(data, SIZE)
    with bounded(tmp_path, seconds=4), suppress(Exception):  # what lies before the pixels of a row that is indexed
        picture_size(BytesIO(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_far_too_much_exif_is_a_bad_picture(tmp_path, kind):
    count = 2**23
    exif = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x112, 3, count, 26) + bytes(4 + 2 * count)
    data = encoded(textured(20, 30), kind, exif=exif)
    for read in (lambda: decode(data, SIZE), lambda: picture_size(BytesIO(data))):
        with bounded(tmp_path, seconds=1, gibibytes=0.1), pytest.raises(BadPicture, match="more than 4 MiB of EXIF"):
            read()


BOMBS = {
    "webp": (
        lambda: webp(9500),
        "too much memory to decode .a WEBP of 9500 x 9500 px: 1,715 MB, the limit is 1,074 MB",
    ),
    "qoi": (lambda: qoi(11_500), "too much memory to decode .a QOI"),
    "scans": (lambda: jpeg_of_many_scans(4000), "too long to decode .a JPEG of 4000 x 4000 px in 300 scans"),
    "python qoi": (lambda: qoi_of_differences(3000), "too long to decode .a QOI of 3000 x 3000 px: about 9 s"),
    "bmp": (lambda: bmp_of_empty_rows(11_500), "too long to decode .a BMP of 11500 x 11500 px: about 12 s"),
    "ppm": (lambda: ppm(2000), "too long to decode .a PPM of 2000 x 2000 px: about 7 s, the limit is 5 s.; save it"),
    "tiff": (lambda: tiff_of_strips(1000, 4000), "too long to decode .a TIFF of 1000 x 1000 px in 4000 parts: about"),
    "tiff of places": (
        lambda: tiff_of_strips(100, 2**21),
        "too long to open .a TIFF with 2,097,152 numbers in its tag 273",
    ),
    "grey jpeg": (lambda: jpeg_that_claims(11_500), "data is too short for its size .* 11500 x 11500 px"),
    "grey progressive jpeg": (lambda: jpeg_that_claims(11_500, progressive=True), "data is too short for its size"),
    "progressive jpeg": (
        lambda: jpeg_that_claims(11_500, progressive=True, subsampling=0) + END + bytes(2**23) + END,
        "data is too short for its size",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_costs_far_more_than_its_size_is_a_bad_picture_by_its_header(tmp_path, bomb):
    make, reason = BOMBS[bomb]
    data = make()
    # The decoder of WebP reserves its canvas when it is opened, which takes no memory until it is written.
    with bounded(tmp_path, seconds=1, gibibytes=1 if bomb == "webp" else 0.1), pytest.raises(BadPicture, match=reason):
        decode(data, SIZE)


def test_indexing_opens_no_tiff_that_takes_long_to_open(tmp_path):
    data = tiff_of_strips(100, 2**21)
    with bounded(tmp_path, seconds=1, gibibytes=0.1), pytest.raises(BadPicture, match="too long to open"):
        picture_size(BytesIO(data))


def test_the_largest_palette_takes_no_more_than_the_limit(tmp_path):
    data = palette_png(11_500)
    assert len(data) < 200_000
    with bounded(tmp_path):
        assert (decode(data, SIZE, background=(7, 8, 9)).pixels == (7, 8, 9)).all()


def test_small_pictures_of_slow_decoders_are_read(tmp_path):
    for data in (qoi_of_differences(300), bmp_of_empty_rows(300), ppm(300), tiff_of_strips(300, 2), ppm(2000, 255)):
        with bounded(tmp_path):
            assert decode(data, SIZE)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
@pytest.mark.parametrize("transparent", [None, 3, bytes([0, 128, 255])])
def test_colours_of_a_palette_are_those_of_its_pixels(kind, transparent):
    picture = textured(60, 80).quantize(40)
    options = {} if transparent is None or (kind == "GIF" and transparent != 3) else {"transparency": transparent}
    data, background = encoded(picture, kind, **options), (9, 200, 77)
    whole = Image.open(BytesIO(data)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, (*background, 255)), whole).convert("RGB")
    assert (decode(data, (60, 80), background=background).pixels == np.asarray(expected)).all()


def test_indexing_reads_a_bombs_size_only(tmp_path):
    for data in (palette_png(300), qoi(300), jpeg_that_claims(9000), jpeg_of_many_scans(64)):
        with bounded(tmp_path, seconds=1, gibibytes=0.1):
            assert picture_size(BytesIO(data))


def test_a_wider_limit_of_pixels_widens_the_limit_of_memory():
    data = webp(7600)  # 58 MP, 1.1 GB
    with pytest.raises(BadPicture, match="too much memory"):
        check(data)
    assert check(data, max_pixels=240_000_000) == (7600, 7600)


# Cut off


@pytest.mark.parametrize("reading", [SIZE, (200, 300)], ids=["reduced", "whole"])
@pytest.mark.parametrize(
    "options",
    [{}, {"restart_marker_rows": 1}, {"progressive": True}, {"optimize": True, "subsampling": 0}],
    ids=["baseline", "restarts", "progressive", "optimized"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_was_cut_and_ended_is_a_bad_picture(mode, options, reading):
    data = encoded(textured(400, 600).convert(mode), "JPEG", **options)
    for kept in (0.3, 0.5) if "progressive" in options else (0.3, 0.5, 0.8):  # its last scan adds a bit of detail
        with pytest.raises(BadPicture, match="cut off"):
            decode(data[: int(len(data) * kept)] + END, reading)
    assert decode(data, reading)


def test_a_jpeg_cut_between_two_restart_intervals_is_a_bad_picture():
    data = encoded(textured(400, 600), "JPEG", restart_marker_rows=1)
    with pytest.raises(BadPicture, match="cut off"):
        decode(data[: data.find(b"\xff\xd5", data.find(b"\xff\xda"))] + END, SIZE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_picture_that_ends_in_grey_is_none_that_was_cut(mode, options):
    pixels = np.array(textured(96, 112).convert(mode))
    pixels[40:] = 128
    for grey in (pixels, np.full_like(pixels, 128), np.full_like(pixels, 127)):
        data = encoded(Image.fromarray(grey, mode), "JPEG", quality=95, **options)
        assert decode(data + b"appended \xff\xd9", (96, 112)).pixels[-1, -1].shape == (3,)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "QOI"])
def test_other_pictures_that_are_cut_are_bad_ones(kind):
    data = encoded(textured(100, 150), kind)
    for kept in (0.3, 0.6, 0.95):
        with pytest.raises(BadPicture):
            decode(data[: int(len(data) * kept)], SIZE)


# What cameras and phones make


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_forty_eight_megapixels_of_a_phone_are_read_upright(tmp_path, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (8000, 6000), (200, 120, 40))
    picture.paste((30, 60, 220), (0, 3000, 8000, 6000))
    data = encoded(picture, "JPEG", exif=exif, **options)
    with bounded(tmp_path):
        pixels, geometry = decode(data, (640, 480))
    assert geometry.source == (8000, 6000)
    assert np.abs(pixels[300, [40, 440]].astype(int) - [(30, 60, 220), (200, 120, 40)]).max() < 4


def test_a_phones_picture_of_several_images_and_appended_video_is_read():
    picture = textured(240, 320)
    preview = textured(60, 80)
    several = encoded(picture, "MPO", save_all=True, append_images=[preview])
    assert Image.open(BytesIO(several)).format == "MPO"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = encoded(picture, "JPEG", icc_profile=icc, progressive=True) + b"\xff\xda" * 1000
    for data in (several, with_profile):
        assert np.abs(decode(data, (240, 320)).pixels.astype(int) - np.array(picture)).mean() < 8


def test_strips_of_a_large_picture_are_one_picture(monkeypatch):
    picture = textured(90, 70)
    picture.putalpha(picture.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 8
    for one in (picture, picture.convert("P"), Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(90, 70) * 10)):
        data = encoded(one, exif=exif)
        whole = decode(data, (70, 90)).pixels
        monkeypatch.setattr("warpcore.data.images._STRIP_PIXELS", 70 * 7)
        assert (decode(data, (70, 90)).pixels == whole).all()
        monkeypatch.undo()


# Where they are told


def test_a_dataset_is_built_without_them(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    cut = encoded(textured(200, 300), "JPEG")
    for name, data in {
        "good.png": encoded(textured(20, 30)),
        "bomb.webp": webp(11_500),
        "grey.jpg": jpeg_that_claims(9000),
        "cut.jpg": cut[: len(cut) // 2] + END,
    }.items():
        (folder / name).write_bytes(data)
    report = build_dataset(folder, tmp_path / "out")
    assert {reason: len(files) for reason, files in report.left_out.files.items()} == {
        "unreadable (it takes too much memory to decode)": 1,
        "unreadable (the JPEG is damaged: its data is too short for its size)": 1,
        "unreadable (the JPEG is cut off: its data ends before the picture does, of which the rest would be grey)": 1,
    }


def test_a_picture_for_inference_is_refused_by_name(tmp_path):
    bomb, cut, path = webp(9500), encoded(textured(200, 300), "JPEG"), tmp_path / "picture"
    for data, reason in ((bomb, "too much memory"), (cut[: len(cut) // 2] + END, "cut off")):
        path.write_bytes(data)
        with bounded(tmp_path, seconds=1), pytest.raises(UserError, match=rf"{path} cannot be read .*{reason}"):
            read_picture(path, SIZE)


def test_a_mask_is_bound_as_a_picture_is(tmp_path):
    geometry = place((9500, 9500), SIZE)
    with bounded(tmp_path, seconds=1), pytest.raises(BadPicture, match="too much memory"):
        decode_alike(webp(9500), geometry)


# Any damage

KINDS = {
    "JPEG": {},
    "progressive": {"progressive": True},
    "CMYK": {},
    "PNG": {},
    "palette": {},
    "WEBP": {},
    "lossless": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "LZW": {"compression": "tiff_lzw"},
    "QOI": {},
}
_FORMATS = {"progressive": "JPEG", "CMYK": "JPEG", "palette": "PNG", "lossless": "WEBP", "LZW": "TIFF"}
_MODES = {"CMYK": "CMYK", "palette": "P"}
SEEDS = {
    kind: encoded(textured(40, 48).convert(_MODES.get(kind, "RGB")), _FORMATS.get(kind, kind), **options)
    for kind, options in KINDS.items()
}
places = st.one_of(st.integers(0, 63), st.integers(0, 2**16))
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "cut", "insert", "drop", "repeat"]),
        places,
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", END]),
    ),
    min_size=1,
    max_size=6,
)


def changed(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for what, position, content in changes:
        at = position % (len(data) + 1)
        following = {
            "set": data[at + len(content) :],
            "cut": END,
            "insert": data[at:],
            "drop": data[at + 9 * len(content) :],
            "repeat": data[max(0, at - 200) :],
        }[what]
        data = data[:at] + (content if what in ("set", "insert") else b"") + following
    return data


@fuzz(150)
@given(st.sampled_from(list(KINDS)), changes)
def test_any_change_gives_pixels_or_a_bad_picture_within_the_bounds(tmp_path_factory, kind, changes):
    data = changed(SEEDS[kind], changes)
    with bounded(tmp_path_factory.getbasetemp()), suppress(BadPicture):
        assert decode(data, (32, 40), "smart").pixels.shape == (32, 40, 3)
