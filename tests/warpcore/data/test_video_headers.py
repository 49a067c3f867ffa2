"""What a container says of its video is what a decoder then shows."""

import io
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import bounded, fuzz
from tests.warpcore.data.clips import encode, numbered
from tests.warpcore.data.videos import cut, decoded, moov_first, sound, turned, video, with_number
from warpcore.data.video_headers import MAX_FRAMES, BadVideo, Header, container_of, read_header
from warpcore.data.videos import decode


def header_of(content: bytes) -> Header:
    return read_header(io.BytesIO(content))


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "h264"), ("mp4", "hevc"), ("mp4", "av1"), ("mp4", "vp9"), ("mov", "h264"), ("webm", "vp9"),
     ("webm", "vp8"), ("matroska", "h264"), ("avi", "mpeg4"), ("mpegts", "h264")],
)  # fmt: skip
def test_every_container_says_what_it_holds(container, codec):
    assert header_of(video(7, codec=codec, container=container)) == Header(
        64, 48, 7, pytest.approx(25), pytest.approx(0.28), codec, constant_rate=True, rotation=0
    )


def test_the_first_video_stream_counts_and_sound_does_not():
    assert header_of(video(7, sound=True)) == header_of(video(7))


def test_the_header_may_stand_before_or_behind_the_frames():
    content = video()
    assert content.index(b"mdat") < content.index(b"moov")
    first = moov_first(content)
    assert first.index(b"moov") < first.index(b"mdat")
    assert len(decoded(first)) == 10
    assert header_of(first) == header_of(content)


@pytest.mark.parametrize("options", ["frag_keyframe", "frag_keyframe+empty_moov"])
def test_frames_of_a_fragmented_file_are_counted_in_its_fragments(options):
    content = video(30, options={"g": "10"}, container_options={"movflags": options})
    header = header_of(content)
    assert (header.num_frames, header.fps, header.constant_rate) == (30, pytest.approx(25), True)


@pytest.mark.parametrize(("first", "last"), [(5, 33), (1, 40), (13, 25), (0, 39), (30, 40)])
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_frames_that_an_edit_list_hides_do_not_count(first, last, container):
    content = cut(video(40, options={"g": "12", "bf": "3"}), first, last, container)
    header = header_of(content)
    assert header.num_frames == len(decoded(content)) == last - first
    assert header.fps == pytest.approx(25)


def test_a_variable_frame_rate_is_noticed_and_averaged():
    times = [0, 40, 80, 200, 210, 400, 440, 480, 520, 900]
    content = video(times=times)
    header = header_of(content)
    assert (header.num_frames, header.constant_rate) == (len(decoded(content)), False)
    assert header.fps == pytest.approx(9 / 0.9)
    assert header_of(video(30, times=[round(1000 * n / 30) for n in range(30)], container="webm", codec="vp9")) == (
        Header(64, 48, 30, pytest.approx(30, abs=0.02), pytest.approx(1, abs=0.002), "vp9", True, 0)
    )


@pytest.mark.parametrize(
    ("matrix", "rotation"), [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270), ((1, 0, 0, 1), 0)]
)
def test_turned_videos_have_the_size_that_is_shown(matrix, rotation):
    content = turned(video(2), matrix)
    header = header_of(content)
    assert -decoded(content)[0].rotation % 360 == header.rotation == rotation
    assert (header.width, header.height) == ((48, 64) if rotation in (90, 270) else (64, 48))


@pytest.mark.parametrize("degrees", [90, 180, 270, 0])
@pytest.mark.parametrize("options", [{}, {"bf": "3"}])
def test_turned_videos_of_matroska_have_the_size_that_is_shown(degrees, options):
    content = encode([numbered(n) for n in range(6)], container="matroska", options=options, turn={"degrees": degrees})
    header, clip = header_of(content), decode(content, [0, 5], (64, 64))
    assert -decoded(content)[0].rotation % 360 == header.rotation
    assert header.rotation in ({90, 270} if degrees in (90, 270) else {degrees})
    assert (header.num_frames, header.height, header.width) == (6, *clip.geometry.source)


@pytest.mark.parametrize(("shape", "size"), [((4, 3), (85, 48)), ((1, 2), (64, 96)), ((1, 1), (64, 48))])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_pixels_that_are_not_square_count_as_shown(shape, size, container):
    header = header_of(video(2, pixel_shape=Fraction(*shape), container=container))
    assert (header.width, header.height) == size


@pytest.mark.parametrize("shape", [(4, 3), (12, 11), (64, 45), (1, 1), (1000, 999), (1, 2)])
@pytest.mark.parametrize(
    "given",
    [
        {}, {"options": {"profile": "baseline"}}, {"options": {"x264-params": "cqm=jvt:mbtree=0"}},
        {"options": {"x264-params": "interlaced=1"}}, {"codec": "hevc"},
    ],
)  # fmt: skip
def test_the_shape_of_pixels_in_the_codec_s_header_alone_counts_as_it_is_decoded(shape, given):
    content = video(6, size=(80, 48), pixel_shape=Fraction(*shape), **given).replace(b"pasp", b"free")
    for place, side in ((76, 80), (80, 48)):
        content = with_number(content, b"tkhd", place, side << 16)
    header, (height, width) = header_of(content), decode(content, [0], (32, 32)).geometry.source
    assert (header.width, header.height) == (width, height)
    assert (width != height * 80 // 48) == (shape not in ((1, 1), (1000, 999)))


def test_a_header_of_hevc_that_says_nothing_readable_leaves_pixels_square():
    content = video(6, size=(80, 48), codec="hevc").replace(b"pasp", b"free")
    place = content.index(b"hvcC")
    for damaged in (bytes(40), bytes(range(40)), b"\xff" * 40):
        header = header_of(content[: place + 4] + damaged + content[place + 44 :])
        assert (header.width, header.height) == (80, 48)


def test_a_single_frame_has_a_rate_too():
    header = header_of(video(1))
    assert header.num_frames == 1
    assert header.fps > 0


KINDS = {
    "B-frames": lambda: video(20, options={"bf": "3"}),
    "single": lambda: video(1),
    "variable": lambda: video(8, times=[0, 40, 80, 200, 210, 400, 440, 900]),
    "edit list": lambda: cut(video(40, options={"g": "12", "bf": "3"}), 5, 33),
    "open GOP": lambda: video(30, codec="hevc", options={"x265-params": "log-level=none:keyint=10:open-gop=1"}),
    "fragmented": lambda: video(20, container_options={"movflags": "frag_keyframe"}, options={"g": "7"}),
    "AV1": lambda: video(20, codec="av1"),
    "VP8": lambda: video(30, codec="vp8", container="webm", options={"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "MPEG-4": lambda: video(20, codec="mpeg4", container="avi", options={"bf": "2"}),
    "MPEG-TS": lambda: video(20, container="mpegts"),
    "Matroska": lambda: video(20, container="matroska"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_frames_are_promised_as_a_clip_can_have(kind):
    content = KINDS[kind]()
    header = header_of(content)
    assert len(decoded(content)) == header.num_frames
    decode(content, [header.num_frames - 1], (32, 32))
    with pytest.raises(BadVideo, match="is not there"):
        decode(content, [header.num_frames], (32, 32))


SAMPLE_COUNT = 8
"""Of the number of frames in `stsz`, after the type."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "empty file"),
        (lambda: bytes(5000), "no MP4"),
        (lambda: bytes(range(256)) * 20, "no MP4"),
        (lambda: moov_first(video())[:-1], "cut short.*its frames end at"),
        (lambda: moov_first(video())[:200], "cut short"),
        (lambda: video()[:-1], "cut short"),
        (lambda: video()[:900], "before its moov"),
        (lambda: video()[: video().index(b"moov") - 4], "no moov"),
        (lambda: video(container="webm", codec="vp9")[:300], "cut short or damaged"),
        (lambda: video(container="avi", codec="mpeg4")[:2000], "cut short or damaged"),
        (sound, "no video stream"),
        (lambda: with_number(video(), b"stsz", SAMPLE_COUNT, 0), "no frame"),
        (lambda: with_number(video(), b"stsz", SAMPLE_COUNT, 1_000_000), "promises 1,000,000 frames"),
        (lambda: with_number(video(), b"stsz", SAMPLE_COUNT, 400_000), "a table of 400,000 entries"),
        (lambda: with_number(video(), b"stsd", 40, (8192 << 16) + 8192), "8192 x 8192 px"),
        (lambda: with_number(video(), b"mdhd", 12, 0), "a clock of 0 ticks"),
        (lambda: with_number(video(), b"mdhd", 12, 2**31), "frame rate can't be true"),
        (lambda: with_number(video(), b"moov", -8, 2**31), "cut short"),
        (lambda: with_number(video(), b"trak", -8, 2**30), "does not fit"),
        (lambda: with_number(video(), b"trak", -8, 2), "does not fit"),
    ],
)  # fmt: skip
def test_what_can_not_be_drawn_is_named(content, reason):
    with pytest.raises(BadVideo, match=reason):
        header_of(content())


def test_frames_of_one_size_can_not_promise_more_than_the_file_holds():
    content = with_number(video(), b"stsz", 4, 1000)
    with pytest.raises(BadVideo, match="its frames end at"):
        header_of(with_number(content, b"stsz", SAMPLE_COUNT, MAX_FRAMES))


def test_playlists_that_name_other_files_are_not_opened(tmp_path):
    for text in ("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "ffconcat version 1.0\nfile /etc/hostname\n"):
        with pytest.raises(BadVideo, match="no MP4"):
            container_of(text.encode().ljust(400))


HOSTILE = {
    "mp4": lambda: moov_first(video(6)),
    "fragmented": lambda: video(6, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "webm": lambda: video(6, container="webm", codec="vp9"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@fuzz(60)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
def test_any_change_gives_a_header_or_a_bad_video_within_the_bounds(tmp_path_factory, kind, changes):
    content = bytearray(_made(kind))
    for place, new in changes:
        place %= len(content)
        content[place : place + len(new)] = new
    with bounded(tmp_path_factory.getbasetemp(), seconds=2):
        try:
            header = header_of(bytes(content))
        except BadVideo:
            return
    assert 0 < header.num_frames <= MAX_FRAMES
    assert header.width > 0 < header.height
    assert 0 < header.fps <= 1000


def _made(kind: str, made={}) -> bytes:  # noqa: B006
    return made.setdefault(kind, None) or made.__setitem__(kind, HOSTILE[kind]()) or made[kind]


def test_a_header_full_of_boxes_or_edits_takes_no_time(tmp_path):
    def box(kind: bytes, *parts: bytes) -> bytes:
        content = b"".join(parts)
        return (8 + len(content)).to_bytes(4) + kind + content

    moov = video(6)
    full = box(b"ftyp") + box(b"moov", *[box(b"trak", *[box(b"mdia")] * 1000)] * 4000)
    many = box(b"ftyp") + box(b"free") * 1_000_000
    edits = box(b"elst", bytes(4), (500_000).to_bytes(4), bytes(12) * 500_000)
    place = moov.index(b"trak") - 4
    size = int.from_bytes(moov[place : place + 4])
    track = box(b"trak", moov[place + 8 : place + size], box(b"edts", edits))
    edited = box(b"ftyp") + box(b"moov", moov[moov.index(b"moov") + 4 : place], track)
    with bounded(tmp_path, seconds=2):
        for content in (full, many, edited):
            with pytest.raises(BadVideo, match=r"damaged|parts"):
                header_of(content)
