import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.bounds import bounded
from tests.warpcore.data import clips
from tests.warpcore.data.clips import KINDS, SIZE, clip, decoded_plainly, encode, number_of, numbered
from tests.warpcore.data.videos import TABLES, with_table
from warpcore.data import images, video_references, videos
from warpcore.data.video_headers import BadVideo, read_header
from warpcore.data.videos import decode

CHOSEN = [[0], [59], [1, 2, 3], [19, 21, 23], [20, 25, 30], [40, 41], [3, 50], [*range(5, 38, 2)], [*range(60)]]
COUNTED = ("mpeg4 avi", "vp8")
"""Of whose packets times do not tell which is the n-th frame that is shown."""


def as_planes(frame: av.VideoFrame, **keys) -> np.ndarray:
    """(H, W, 3) of a frame that is converted on its own, of unchanged size."""
    keys = {"src_colorspace": "itu601", "interpolation": "BILINEAR", "threads": 1} | keys
    return frame.reformat(format="gbrp", **keys).to_ndarray(format="gbrp")


# Frames


@pytest.mark.parametrize("variable", [False, True], ids=["constant rate", "variable rate"])
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_frames_are_bit_for_bit_those_of_decoding_the_whole_video(kind, variable, monkeypatch):
    data = clip(kind, variable and "avi" not in kind)
    whole = [as_planes(frame) for frame in decoded_plainly(data)]
    assert [number_of(picture) for picture in whole] == list(range(60))
    if kind not in COUNTED:  # then nothing may be decoded from the beginning
        monkeypatch.setattr(videos, "_by_counting", None)
    for chosen in CHOSEN:
        pixels = decode(data, chosen, SIZE).pixels
        assert [number_of(picture) for picture in pixels] == chosen
        assert all(np.array_equal(picture, whole[number]) for picture, number in zip(pixels, chosen, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_counts_the_frames_that_can_be_decoded(kind):
    header = read_header(io.BytesIO(clip(kind)))
    video = decode(clip(kind), [header.num_frames - 1], SIZE)
    assert number_of(video.pixels[0]) == header.num_frames - 1 == 59
    assert video.geometry.source == (header.height, header.width)


@pytest.mark.parametrize(
    ("kind", "left"),
    [("h264", 33), ("h264 open", 34), ("h264 ts", 33), ("hevc", 31), ("hevc layers", 32), ("vp9", 60)],
)
def test_frames_that_no_chosen_one_refers_to_are_not_decoded(kind, left):
    with av.open(io.BytesIO(clip(kind))) as opened:
        stream = opened.streams.video[0]
        packets = [packet for packet in opened.demux(stream) if packet.size]
        ends = [place in (0, 50) for place in range(len(packets))]
        assert len(list(video_references.without_unused(packets, ends, stream.codec_context))) == left


def test_open_groups_of_pictures_and_temporal_layers_are_in_these_tests():
    def kinds(of: str, shift: int, mask: int) -> set[int]:
        with av.open(io.BytesIO(clip(of))) as opened:
            stream = opened.streams.video[0]
            units = video_references._splitter(stream.codec_context)
            packets = [memoryview(packet) for packet in opened.demux(stream) if packet.size]
            return {header[0 if shift >= 0 else 1] >> max(shift, 0) & mask for one in packets for header in units(one)}

    assert {8, 9, 21} <= kinds("hevc", 1, 63)  # RASL and CRA: leading pictures that refer across a key frame
    assert kinds("hevc layers", -1, 7) == {1, 2}
    assert sum(packet.is_keyframe for packet in packets_of(clip("h264 open"))) == 3  # of which one alone is an IDR


def packets_of(data: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(data)) as opened:
        return [packet for packet in opened.demux(video=0) if packet.size]


def test_frames_before_the_last_key_frame_are_not_decoded(monkeypatch):
    fed = []
    monkeypatch.setattr(videos, "without_unused", lambda packets, *_: fed.append(len(packets)) or iter(packets))
    decode(clip("h264"), [50, 52], SIZE)
    assert fed[0] < 10  # key frames are 0, 24 and 48


def cut_by_an_edit_list(kind: str, frames: int) -> bytes:
    """A clip whose first frames are in the file, but not shown."""
    file = io.BytesIO()
    with av.open(io.BytesIO(clip(kind))) as opened, av.open(file, "w", format="mp4") as cut:
        cut_stream = cut.add_stream_from_template(opened.streams.video[0])
        for packet in opened.demux(video=0):
            if packet.size:
                ticks = int(frames / 24 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, cut_stream
                cut.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["h264", "hevc"])
def test_frames_that_an_edit_list_cuts_away_are_not_counted(kind):
    data = cut_by_an_edit_list(kind, 10)
    assert [number_of(as_planes(frame)) for frame in decoded_plainly(data)] == list(range(10, 60))
    for chosen in ([0], [1, 3, 20], [12, 14, 16], [49]):
        assert [number_of(picture) for picture in decode(data, chosen, SIZE).pixels] == [n + 10 for n in chosen]
    with pytest.raises(BadVideo, match="it has 50 frames"):
        decode(data, [50], SIZE)


def test_a_stream_that_starts_within_a_group_of_pictures_shows_what_decoders_show():
    data = clip("hevc ts")
    cut = data[len(data) // 4 // 188 * 188 :]
    whole = [number_of(as_planes(frame)) for frame in decoded_plainly(cut)]
    assert 30 < len(whole) < 60
    for chosen in ([0, 1, 2], [5, 20], [len(whole) - 1]):
        assert [number_of(picture) for picture in decode(cut, chosen, SIZE).pixels] == [whole[n] for n in chosen]


def test_where_seeking_finds_no_frame_the_video_is_decoded_from_its_beginning(monkeypatch):
    monkeypatch.setattr(videos, "_find_packets", lambda *_: ([], []))  # as of a file with wrong times
    monkeypatch.setattr(videos, "without_unused", lambda *_: iter(()))
    assert [number_of(picture) for picture in decode(clip("h264"), [3, 30], SIZE).pixels] == [3, 30]


def test_frames_are_chosen_in_ascending_order():
    for frames in ([], [-1, 2], [3, 2], [3, 3]):
        with pytest.raises(ValueError, match="ascending"):
            decode(clip("h264"), frames, SIZE)


# Pixels

PATCHES = [
    (255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255),
    (255, 255, 0), (0, 255, 255), (255, 0, 255), (200, 120, 60), (60, 200, 120), (120, 60, 200),
]  # fmt: skip
LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
"""Weights of red and blue: ITU-R BT.601, BT.709 and BT.2020."""
MATRIX_TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9}  # ITU-T H.273, table 4
RANGE_TAGS = {"tv": 1, "full": 2}


def patches(matrix: str, full_range: bool, depth: int = 8, side: int = 32) -> av.VideoFrame:
    """A frame (3 x 4 patches) of YUV 4:4:4, converted by the formulas of the standards."""
    red, blue = LUMA[matrix]
    r, g, b = np.array(PATCHES, np.float64).T / 255
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    scale, offset, chroma, middle = (255, 0, 255, 128) if full_range else (219, 16, 224, 128)
    planes = np.stack([y * scale + offset, cb * chroma + middle, cr * chroma + middle])
    planes = np.kron(planes.reshape(3, 3, 4), np.ones((1, side, side))).round().clip(0, 255).astype(np.uint8)
    return av.VideoFrame.from_ndarray(planes, format="yuv444p")


def patch_error(data: bytes, size: tuple[int, int], **keys) -> int:
    """The largest error of a patch's colour, in 1/255."""
    picture = decode(data, [0, 2], size, **keys).pixels[1].astype(int)
    rows, columns = (np.arange(n) * side // n + side // n // 2 for n, side in zip((3, 4), size, strict=True))
    return int(np.abs(picture[np.ix_(rows, columns)].reshape(-1, 3) - PATCHES).max())


LOSSLESS = {"preset": "ultrafast", "qp": "0"}


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("full", [False, True], ids=["tv", "full"])
@pytest.mark.parametrize("matrix", LUMA)
def test_colours_are_right_for_every_matrix_and_range(matrix, full, pix_fmt):
    tags = {"colorspace": MATRIX_TAGS[matrix], "color_range": 2 if full else 1}
    frames = [patches(matrix, full) for _ in range(3)]
    if pix_fmt != "yuv444p":  # of flat colours, chroma of half the size is the same
        frames = [frame.reformat(format=pix_fmt, src_color_range=tags["color_range"],
                                 dst_color_range=tags["color_range"]) for frame in frames]  # fmt: skip
    data = encode(frames, pix_fmt=pix_fmt, tags=tags, options=LOSSLESS)
    assert patch_error(data, (96, 128)) <= 3
    assert patch_error(data, (48, 64)) <= 3


def test_videos_without_a_matrix_are_bt601_when_small_and_bt709_when_large_unless_told():
    small, large = (encode([patches(matrix, False, side=side)] * 3, pix_fmt="yuv444p", options=LOSSLESS)
                    for matrix, side in (("bt601", 32), ("bt709", 240)))  # fmt: skip
    assert patch_error(small, (96, 128)) <= 3
    assert patch_error(large, (96, 128)) <= 3
    assert patch_error(small, (96, 128), untagged_matrix="bt601") <= 3
    assert patch_error(small, (96, 128), untagged_matrix="bt709") > 15
    assert patch_error(large, (96, 128), untagged_matrix="bt601") > 15


@pytest.mark.parametrize("crop", ["center", "random", "smart"])
@pytest.mark.parametrize("size", [(48, 48), (64, 40), (96, 160), (120, 120)])
def test_a_frame_is_resized_and_cropped_as_the_same_picture_is(crop, size):
    data = clip("h264")
    file = io.BytesIO()
    Image.fromarray(as_planes(decoded_plainly(data)[20])).save(file, "PNG")
    picture = images.decode(file.getvalue(), size, crop, seed=7)
    video = decode(data, [20, 30], size, crop, seed=7)
    if crop == "smart":  # it looks at a smaller picture, whose details differ a little
        corners = [(one.geometry.top, one.geometry.left) for one in (picture, video)]
        assert np.abs(np.subtract(*corners)).max() <= 4
    else:
        assert video.geometry == picture.geometry
        assert np.abs(video.pixels[0].astype(int) - picture.pixels).mean() < 3


def test_all_frames_have_one_crop_and_seeds_draw_it():
    pixels, geometry = decode(clip("h264"), [0, 30], (96, 96), "random", seed=3)
    whole = [as_planes(frame) for frame in decoded_plainly(clip("h264"))]
    columns = slice(geometry.left, geometry.left + 96)
    assert np.array_equal(pixels[0], whole[0][:, columns])
    assert np.array_equal(pixels[1], whole[30][:, columns])
    lefts = {decode(clip("h264"), [0], (96, 96), "random", seed=seed)[1].left for seed in range(12)}
    assert len(lefts) > 6


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ({"degrees": 90}, lambda picture: np.rot90(picture, 1)),
        ({"degrees": 180}, lambda picture: np.rot90(picture, 2)),
        ({"degrees": -90}, lambda picture: np.rot90(picture, -1)),
        ({"degrees": 0, "hflip": True}, lambda picture: picture[:, ::-1]),
        ({"degrees": 0, "vflip": True}, lambda picture: picture[::-1]),
    ],
    ids=["90", "180", "-90", "mirror", "upside down"],
)
def test_rotation_and_mirrors_are_applied(turn, shown):
    data = encode([numbered(number) for number in range(6)], options=KINDS["h264"]["options"], turn=turn)
    upright = [shown(as_planes(frame)) for frame in decoded_plainly(data)]
    video = decode(data, [1, 4], upright[0].shape[:2])
    assert np.array_equal(video.pixels[0], upright[1])
    assert np.array_equal(video.pixels[1], upright[4])
    header = read_header(io.BytesIO(data))
    assert video.geometry.source == upright[0].shape[:2] == (header.height, header.width)


def test_other_angles_are_refused():
    with pytest.raises(BadVideo, match="turned by 29 degrees"):
        decode(encode([numbered(0)] * 3, turn={"degrees": 29.5}), [0], SIZE)


@pytest.mark.parametrize(("pixel_shape", "shown"), [((4, 3), (96, 213)), ((1, 2), (192, 160))])
def test_pixels_that_are_not_square_become_so(pixel_shape, shown):
    data = encode([numbered(number) for number in range(4)], pixel_shape=pixel_shape)
    video, header = decode(data, [2], (96, 96)), read_header(io.BytesIO(data))
    assert video.geometry.source == shown == (header.height, header.width)
    whole = as_planes(decoded_plainly(data)[2], width=video.geometry.resized[1], height=video.geometry.resized[0])
    top, left = video.geometry.top, video.geometry.left
    assert np.array_equal(video.pixels[0], whole[top : top + 96, left : left + 96])


def test_pixels_are_written_to_a_given_place():
    out = np.zeros((2, 3, *SIZE), np.uint8)
    pixels = decode(clip("h264"), [3, 9], SIZE, out=out).pixels
    assert np.shares_memory(pixels, out)
    assert [number_of(picture) for picture in out.transpose(0, 2, 3, 1)] == [3, 9]


# What is no good video


def audio_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as opened:
        stream = opened.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (bytes(5000), "it is no MP4"),
        (np.random.default_rng(0).bytes(5000), "it is no MP4"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "it is no MP4"),
        (audio_only(), "it holds no video, but audio"),
        (clip("h264")[:7000], "can't be decoded"),  # its moov comes last
        (clip("h264 mkv")[:6000], "it has 2. frames; number 59"),
        (clip("h264 ts")[:14000], "it has 2. frames; number 59"),
        (clip("vp8")[:9000], "it shows fewer frames|incomplete|can't be decoded"),
    ],
)
def test_what_is_no_video_or_is_cut_off_says_so(data, message, tmp_path):
    with bounded(tmp_path), pytest.raises(BadVideo, match=message):
        decode(data, [0, 59], SIZE)


def moov_first(kind: str, folder: Path) -> bytes:
    """The clip as a file that says at its beginning where its frames are."""
    path = folder / "clip.mp4"
    with (
        av.open(io.BytesIO(clip(kind))) as source,
        av.open(path, "w", options={"movflags": "faststart"}) as opened,
    ):
        stream = opened.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                opened.mux(packet)
    return path.read_bytes()


def test_frames_behind_the_end_of_a_cut_file_are_bad_and_those_before_are_not(tmp_path):
    data = moov_first("h264", tmp_path)
    cut = data[: len(data) * 3 // 4]
    assert [number_of(picture) for picture in decode(cut, [0, 10], SIZE).pixels] == [0, 10]
    with pytest.raises(BadVideo):
        decode(cut, [0, 55], SIZE)


@pytest.mark.parametrize("kind", ["h264", "hevc with checksums"])
def test_damaged_frames_are_noticed_also_through_those_that_refer_to_them(kind):
    codec, options = "libx264", KINDS["h264"]["options"]
    if kind != "h264":
        codec, options = "libx265", {"preset": "ultrafast", "x265-params": f"{clips.X265}:hash=1:keyint=60"}
    data = encode([numbered(number) for number in range(60)], codec, options=options)
    found = 0
    for packet in packets_of(data)[1:20:3]:
        damaged = bytearray(data)
        place = packet.pos + packet.size // 2
        damaged[place : place + 8] = np.random.default_rng(packet.pos).bytes(8)
        try:
            pixels = decode(bytes(damaged), [0, 40], SIZE).pixels
        except BadVideo:
            found += 1
        else:  # the damaged frame was not needed
            assert np.array_equal(pixels, decode(data, [0, 40], SIZE).pixels)
    assert found >= 3


def test_frames_that_are_not_there_are_bad():
    for kind in ("h264", "vp8"):
        with pytest.raises(BadVideo, match=r"it has 60 frames|fewer frames"):
            decode(clip(kind), [59, 60], SIZE)


def test_too_large_frames_and_too_many_before_the_chosen_are_refused(monkeypatch):
    with pytest.raises(BadVideo, match=r"more than 15000 pixels \(160 x 96 px\)"):
        decode(clip("h264"), [0], SIZE, max_pixels=15000)
    monkeypatch.setattr(videos, "MAX_DECODED_PIXELS", 12 * 96 * 160)
    assert decode(clip("h264"), [0, 9], SIZE).pixels.shape == (2, *SIZE, 3)
    assert decode(clip("h264"), [50], SIZE).pixels.shape == (1, *SIZE, 3)
    for kind in ("h264", "vp8"):
        with pytest.raises(BadVideo, match="encode it with a key frame"):
            decode(clip(kind), [0, 20], SIZE)


def test_frames_that_would_become_huge_to_cover_their_bucket_are_refused():
    strip = encode([np.zeros((4096, 16, 3), np.uint8)] * 2)
    assert decode(strip, [0, 1], (512, 16)).pixels.shape == (2, 512, 16, 3)
    with pytest.raises(BadVideo, match=r"to cover 512 x 512 px its frames of 16 x 4096 px would become 512 x 131072"):
        decode(strip, [0, 1], (512, 512))


def test_a_header_that_understates_the_size_of_frames_is_found_by_the_decoder():
    data = encode([np.zeros((512, 512, 3), np.uint8)] * 3)
    small = data.replace(b"\x02\x00\x02\x00\x00\x48", b"\x00\x40\x00\x40\x00\x48")
    assert small != data
    with pytest.raises(BadVideo):
        decode(small, [0], (64, 64), max_pixels=256 * 256)


def test_bytes_that_many_packets_share_are_not_held_for_all(tmp_path):
    """Tables may place a million frames upon the same bytes."""
    data = clip("h264")
    start = data.index(b"mdat") + 4
    data = with_table(data, [*TABLES, b"stsz"], [len(data) // 2, 60])  # all frames are as long
    data = with_table(data, [*TABLES, b"stsc"], [1, 1, 1, 1])  # in a part of their own each
    data = with_table(data, [*TABLES, b"stco"], [60, *[start] * 60])  # all of which lie in one place
    with bounded(tmp_path), pytest.raises(BadVideo, match="lie over one another"):
        decode(data, [0, 59], SIZE)
