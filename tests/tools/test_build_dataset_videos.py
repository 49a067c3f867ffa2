"""Folders of videos become tars: whole, cut, or as pictures."""

import io
import json
import re

import av
import numpy as np
import pytest
from PIL import Image

from tests.tools.test_build_dataset import samples_of
from tests.warpcore.data.tars import catalog_of, picture
from tests.warpcore.data.videos import decoded, sound, turned, video
from tools import build_dataset as build
from tools.build_dataset import build_dataset, main
from tools.video_parts import Parts
from warpcore.data.index import read_rows
from warpcore.data.videos import decode
from warpcore.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def rows_of(out) -> dict[str, dict]:
    catalog = catalog_of(out)
    return {row["key"]: row for number in range(len(catalog)) for row in read_rows(catalog.shard(number)).to_pylist()}


def brightness(content: bytes) -> list[int]:
    """Of each frame of a video, whose frame n has 20 n of 255."""
    return [int(np.median(frame.to_ndarray(format="gray"))) for frame in decoded(content)]


def test_videos_are_packed_byte_by_byte_with_what_belongs_to_them(folder, tmp_path):
    clips = {
        "a.mp4": video(10),
        "b.webm": video(20, codec="vp9", container="webm"),
        "c.MOV": turned(video(5), (0, 1, -1, 0)),
    }
    for name, content in clips.items():
        (folder / name).write_bytes(content)
    (folder / "a.txt").write_text("a clip")
    (folder / "a.json").write_text('{"flow": 2.5}')
    (folder / "b.mp4.txt").write_text("of no video")
    (folder / "d.jpg").write_bytes(picture())
    (folder / "cut.mp4").write_bytes(video()[:-1])
    (folder / "sound.mp4").write_bytes(sound())
    report = build_dataset(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert samples["a"] | {"__url__": 0} == samples["a"] | {"__url__": 0, "mp4": clips["a.mp4"], "txt": b"a clip"}
    assert (samples["b"]["webm"], samples["c"]["mov"]) == (clips["b.webm"], clips["c.MOV"])
    rows = rows_of(tmp_path / "out")
    assert {key: (row["num_frames"], row["width"]) for key, row in rows.items()} == {
        "a": (10, 64), "b": (20, 64), "c": (5, 48), "d": (None, 16),
    }  # fmt: skip
    assert rows["a"]["json.flow"] == 2.5
    told = str(report)
    assert "kept 1 picture and 3 videos in 1 tar" in told
    assert "videos: 5 to 20 frames, 0.2 to 0.8 s, 25 to 25 frames per second; 2 h264, 1 vp9" in told
    assert "1 unreadable (it has no video stream): sound.mp4" in told
    assert "1 unreadable (it is cut short): cut.mp4" in told
    assert "a caption without a picture, or a second one: b.mp4.txt" in told


def test_open_soras_table_gives_captions_and_scores(folder, tmp_path):
    (folder / "videos").mkdir()
    (folder / "videos" / "a.mp4").write_bytes(video(10))
    table = tmp_path / "meta.csv"
    table.write_text(
        "path,text,num_frames,height,width,aspect_ratio,resolution,fps,aes,flow\n"
        f'{folder}/videos/a.mp4,"A dog, running.",99,720,1280,0.5625,921600,24.0,5.25,7.5\n'
    )
    build_dataset(folder, tmp_path / "out", metadata=table)
    (row,) = rows_of(tmp_path / "out").values()
    assert samples_of(tmp_path / "out")["videos/a"]["txt"] == b"A dog, running."
    assert (row["num_frames"], row["fps"], row["width"]) == (
        10,
        25,
        64,
    )  # of the file; the table may be of another one
    assert (row["json.aes"], row["json.flow"], row["json.num_frames"]) == (5.25, 7.5, 99)


@pytest.mark.parametrize("how", ["jsonl", "csv", "json"])
def test_videos_are_cut_at_the_times_that_are_given(folder, tmp_path, how):
    (folder / "a.mp4").write_bytes(video(12, options={"g": "4", "bf": "2"}))
    cuts = [[0.08, 0.2], [0.28, 9]]
    if how == "jsonl":
        (folder / "metadata.jsonl").write_text(
            json.dumps({"file_name": "a.mp4", "text": "hi", "cuts": cuts, "flow": 3})
        )
    elif how == "csv":
        (folder / "metadata.csv").write_text(f'file_name,text,cuts,flow\na.mp4,hi,"{cuts}",3\n')
    else:
        (folder / "a.txt").write_text("hi")
        (folder / "a.json").write_text(json.dumps({"cuts": cuts, "flow": 3}))
    build_dataset(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    frames = {"a__0001": [2, 3, 4], "a__0002": [7, 8, 9, 10, 11]}
    assert samples.keys() == frames.keys()
    for (key, numbers), (start, end) in zip(frames.items(), cuts, strict=True):
        assert brightness(samples[key]["mp4"]) == pytest.approx([20 * number for number in numbers], abs=3)
        assert samples[key]["txt"] == b"hi"
        assert json.loads(samples[key]["json"]) == {"flow": 3, "cut_start": start, "cut_end": end}
    rows = rows_of(tmp_path / "out")
    assert [(row["num_frames"], row["fps"], row["codec"]) for row in rows.values()] == [
        (3, 25, "h264"),
        (5, 25, "h264"),
    ]


def test_long_videos_are_cut_into_pieces(folder, tmp_path, capsys):
    (folder / "long.mp4").write_bytes(video(12))
    (folder / "short.mp4").write_bytes(short := video(5))
    main([str(folder), str(tmp_path / "out"), "--cut", "0.2"])
    samples = samples_of(tmp_path / "out")
    assert sorted(samples) == ["long__0001", "long__0002", "long__0003", "short"]
    pieces = [brightness(samples[f"long__{number:04d}"]["mp4"]) for number in (1, 2, 3)]
    assert np.allclose([one for piece in pieces for one in piece], [20 * number for number in range(12)], atol=3)
    assert list(map(len, pieces)) == [5, 5, 2]
    assert samples["short"]["mp4"] == short
    assert "kept 4 videos" in capsys.readouterr().out


def test_what_is_turned_or_not_square_is_cut_as_it_is_shown(folder, tmp_path):
    from fractions import Fraction

    (folder / "turned.mp4").write_bytes(turned(video(4, (64, 48)), (0, 1, -1, 0)))
    (folder / "wide.mp4").write_bytes(video(4, pixel_shape=Fraction(4, 3)))
    times = [0, 40, 80, 300]
    (folder / "variable.mp4").write_bytes(video(4, times=times))
    assert "left out 0" in str(build_dataset(folder, tmp_path / "out", parts=Parts(cut_seconds=0.1)))
    rows = rows_of(tmp_path / "out")
    assert {(row["width"], row["height"], row["rotation"]) for key, row in rows.items() if "turned" in key} == {
        (48, 64, 0)
    }
    assert {(row["width"], row["height"]) for key, row in rows.items() if "wide" in key} == {(85, 48)}
    first = samples_of(tmp_path / "out")["variable__0001"]["mp4"]
    assert [float(frame.pts * frame.time_base) for frame in decoded(first)] == pytest.approx([0, 0.04, 0.08], abs=1e-3)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_cuts_are_turned_as_clips_are(folder, tmp_path, matrix):
    file = io.BytesIO()
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 200  # one corner is bright
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    (folder / "a.mp4").write_bytes(content := turned(file.getvalue(), matrix))
    build_dataset(folder, tmp_path / "out", parts=Parts(cut_seconds=0.08))
    (frame, *_) = decoded(samples_of(tmp_path / "out")["a__0001"]["mp4"])
    size = (64, 48) if matrix[0] == 0 else (48, 64)
    shown = decode(content, [0], size).pixels[0]
    assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - shown).mean() < 4


def test_cuts_keep_colours(folder, tmp_path):
    file = io.BytesIO()
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [120, 120, 120]], np.uint8)
    pixels = np.repeat(np.repeat(colours[None], 16, 1), 64, 0)
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 1, 2, 1, 1
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            output.mux(
                stream.encode(frame.reformat(dst_colorspace="ITU709", dst_color_range="JPEG", format="yuv420p"))
            )
        output.mux(stream.encode())
    (folder / "a.mp4").write_bytes(file.getvalue())
    build_dataset(folder, tmp_path / "cut", parts=Parts(cut_seconds=0.08))
    build_dataset(folder, tmp_path / "pictures", parts=Parts(frames_every=3))
    (first, *_) = decoded(samples_of(tmp_path / "cut")["a__0001"]["mp4"])
    shown = first.reformat(format="rgb24").to_ndarray()
    drawn = np.asarray(Image.open(io.BytesIO(samples_of(tmp_path / "pictures")["a__0001"]["jpg"])))
    for found in (shown, drawn):
        assert np.abs(found[32, 8::16].astype(int) - colours).max() <= 8


@pytest.mark.parametrize(("container", "codec"), [("mpegts", "h264"), ("avi", "h264"), ("matroska", "hevc")])
def test_pieces_together_have_every_frame_in_containers_that_seek_badly(folder, tmp_path, container, codec):
    content = video(60, container=container, codec=codec, fps=10, options={"g": "250", "bf": "2"})
    extension = {"mpegts": "ts", "matroska": "mkv"}.get(container, container)
    (folder / f"a.{extension}").write_bytes(content)
    build_dataset(folder, tmp_path / "out", parts=Parts(cut_seconds=2))
    pieces = samples_of(tmp_path / "out")
    for number in range(3):
        expected = [20 * frame % 256 for frame in range(20 * number, 20 * number + 20)]
        assert brightness(pieces[f"a__{number + 1:04d}"]["mp4"]) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("change", [lambda _: video(20), lambda content: content[:-1]], ids=["shorter", "cut off"])
def test_a_video_that_changes_while_many_processes_build_is_named(folder, tmp_path, monkeypatch, change):
    (folder / "a.mp4").write_bytes(video(50))
    load = build.load_samples_again

    def changed(entry):
        entry.picture.write_bytes(change(entry.picture.read_bytes()))
        return load(entry)

    monkeypatch.setattr(build, "load_samples_again", changed)
    monkeypatch.setattr(build, "_build_alone", build._build_together)
    with pytest.raises(UserError, match=r"a\.mp4 changed while the data set was built: a__0001 is gone"):
        build_dataset(folder, tmp_path / "out", parts=Parts(cut_seconds=1))


def test_damaged_frames_are_in_no_cut(folder, tmp_path):
    content = bytearray(video(80, options={"g": "8"}))
    key_frame = content.rindex(b"\x65\x88")  # a slice of H.264 with its first bits
    content[key_frame + 2 : key_frame + 30] = bytes(28)
    for name, cuts in (("a", [[0, 1]]), ("b", [[2.5, 3.2]])):
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.json").write_text(json.dumps({"cuts": cuts}))
    report = build_dataset(folder, tmp_path / "out")
    assert list(samples_of(tmp_path / "out")) == ["a__0001"]
    assert "left out 1\n  1 unreadable (" in str(report)


def test_times_that_can_not_be_true_make_no_pieces(folder, tmp_path):
    (folder / "a.mp4").write_bytes(video(2, times=[0, 100_000_000]))
    (folder / "b.mp4").write_bytes(video(10))
    (folder / "c.mp4").write_bytes(video(10))
    (folder / "c.json").write_text('{"cuts": [[0, 0.2], [1e15, 9e15]]}')
    report = str(build_dataset(folder, tmp_path / "out", parts=Parts(cut_seconds=0.5)))
    assert "kept 2 videos" in report
    assert "1 unreadable (pieces of this length are more than 100000): a.mp4" in report
    assert "1 a cut that shows no frame: c.mp4" in report


@pytest.mark.parametrize("cuts", ["soon", [[1]], [[2, 1]], [["a", "b"]], [[-1, 1]], [[0, 10**400]], {"a": 1}])
def test_cuts_that_are_no_times_are_named(folder, tmp_path, cuts):
    (folder / "a.mp4").write_bytes(video())
    (folder / "a.json").write_text(json.dumps({"cuts": cuts}))
    with pytest.raises(UserError, match=r"1 unreadable \(its cuts are no pairs of seconds"):
        build_dataset(folder, tmp_path / "out")


def test_a_cut_behind_the_end_is_named(folder, tmp_path):
    (folder / "a.mp4").write_bytes(video(10))
    (folder / "a.json").write_text('{"cuts": [[0, 0.2], [5, 6]]}')
    report = build_dataset(folder, tmp_path / "out")
    assert "kept 1 video" in str(report)
    assert "1 a cut that shows no frame: a.mp4" in str(report)


def test_every_nth_frame_becomes_a_picture(folder, tmp_path):
    (folder / "a.mp4").write_bytes(turned(video(12, options={"bf": "2"}), (0, 1, -1, 0)))
    (folder / "a.txt").write_text("a clip")
    (folder / "b.jpg").write_bytes(still := picture())
    main([str(folder), str(tmp_path / "out"), "--frames-every", "5", "--samples-per-shard", "2"])
    samples = samples_of(tmp_path / "out")
    assert samples.pop("b")["jpg"] == still
    assert [json.loads(samples[f"a__{number:04d}"]["json"])["frame"] for number in (1, 2, 3)] == [0, 5, 10]
    for number, sample in enumerate(samples.values()):
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert image.size == (48, 64)
        assert np.median(np.asarray(image.convert("L"))) == pytest.approx(100 * number, abs=3)
        assert sample["txt"] == b"a clip"
    assert all("num_frames" not in row for row in rows_of(tmp_path / "out").values())
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_damaged_frames_are_no_pictures_and_are_named(folder, tmp_path):
    content = bytearray(video(80, options={"g": "8"}))
    last_key_frame = content.rindex(b"\x65\x88")  # a slice of H.264 with its first bits
    content[last_key_frame + 2 : last_key_frame + 30] = bytes(28)
    (folder / "a.mp4").write_bytes(content)
    report = build_dataset(folder, tmp_path / "out", parts=Parts(frames_every=1))
    assert "kept 64 pictures" in str(report)
    assert "left out 1\n  1 unreadable (" in str(report)


def test_animations_in_pictures_files_are_told_and_parts_of_a_video_are_named_once(folder, tmp_path, capsys):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    for name in ("moving.gif", "turning.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.webp")
    frames[0].save(folder / "camera.jpg", format="MPO", save_all=True, append_images=[frames[1]])  # with a preview
    first, whole = (folder / "one.gif", folder / "moving.gif")
    frames[0].save(first)
    (folder / "broken.gif").write_bytes(whole.read_bytes()[: first.stat().st_size + 25])  # in its second frame
    (folder / "5long.mp4").write_bytes(video(60, options={"g": "10"}))
    main([str(folder), str(tmp_path / "out"), "--cut", "0.5"])
    told = capsys.readouterr().out
    named = re.search(r"several frames in a picture's file: 3 \((.*)\); the first one is taken: convert them", told)[1]
    assert sorted(named.split(", ")) == ["broken.gif", "moving.gif", "turning.webp"]
    names = re.search(r"no caption: 11 \((.*), \.\.\.\)", told)[1].split(", ")
    assert len(set(names)) == len(names) == 3
