"""Clips to look at: their files play what was given, and a run writes them beside its sheets."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from tests.warpcore.runs import tiny_settings, write_shard
from tests.warpcore.test_redaction import SECRET, URLS
from tests.warpcore.tiny import Denoiser
from warpcore import clips, evaluation, pictures
from warpcore.config import make_config
from warpcore.results import Sampled
from warpcore.tracking import Tracker


def moving(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth colour that changes from frame to frame."""
    rows, columns = np.mgrid[:height, :width]
    pixels = [np.stack([4 * rows + 9 * time, 3 * columns, 200 - 12 * time + 0 * rows], -1) for time in range(frames)]
    return np.stack(pixels).astype(np.uint8)


def played(data: bytes) -> tuple[np.ndarray, tuple[str, str, float]]:
    """The frames, and the codec, the format of pixels and the rate, which a stream tells while its file is open."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        context = stream.codec_context
        return frames, (context.name, context.pix_fmt, float(stream.average_rate))


def test_a_text_beside_a_clip_is_read_back_and_its_credentials_are_not_written():
    clip, said = moving(), 'a "box" [ü], ☕'
    assert clips.about_of(clips.encode_mp4(clip, 8, about=said)) == said
    assert clips.about_of(clips.encode_mp4(clip, 8)) == clips.about_of(b"no clip") == ""
    assert SECRET not in clips.about_of(clips.encode_mp4(clip, 8, about=URLS[0]))


def test_an_mp4_plays_the_clip_in_its_colours_and_at_its_rate():
    clip = moving()
    shown, stream = played(clips.encode_mp4(clip, 12.5))
    assert shown.shape == clip.shape
    assert np.abs(shown.astype(int) - clip).mean() < 3
    assert stream == ("h264", "yuv420p", 12.5)
    assert clips.encode_mp4(clip, 12.5) == clips.encode_mp4(clip, 12.5)


def test_a_sheet_that_no_video_format_takes_is_shown_smaller():
    clip = np.zeros((2, 8, 8 * 2352, 3), np.uint8)
    clip[:, :, 8 * 1176 :] = 200
    shown, _ = played(clips.encode_mp4(clip, 8.0))
    assert shown.shape == (2, 4, 4 * 2352, 3)
    with Image.open(io.BytesIO(clips.encode_webp(clip, 8.0))) as image:
        assert image.size == (4 * 2352, 4)
        pixels = np.asarray(image.convert("RGB"))
    for picture in (shown[0], pixels):
        assert [np.median(picture[:, :4000]), np.median(picture[:, 5000:])] == pytest.approx([0, 200], abs=3)


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (31, 47), (1, 1)])
def test_odd_sides_repeat_their_last_row_or_column(height, width):
    clip = moving(3, height, width)
    shown, _ = played(clips.encode_mp4(clip, 8))
    assert shown.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(shown[:, :height, :width].astype(int) - clip).mean() < 4


def test_an_animated_webp_shows_every_frame_and_begins_again():
    clip = moving()
    image = Image.open(io.BytesIO(clips.encode_webp(clip, 16)))
    assert (image.n_frames, image.info["loop"]) == (6, 0)
    durations = []
    for number in range(6):
        image.seek(number)
        assert np.abs(np.array(image.convert("RGB")).astype(int) - clip[number]).mean() < 5
        durations.append(image.info["duration"])
    assert sum(durations) == 375


@pytest.mark.parametrize(
    "wrong", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)]
)
def test_what_is_no_clip_is_refused(wrong):
    for write in (clips.encode_mp4, clips.encode_webp, clips.encode_gif):
        with pytest.raises(ValueError, match="a clip is uint8"):
            write(wrong, 8)


def test_a_strip_shows_the_first_and_the_last_frame():
    clip = moving(9, 4, 5)
    assert np.array_equal(clips.strip(clip), np.hstack(clip[[0, 3, 5, 8]]))
    assert np.array_equal(clips.strip(clip[:2]), np.hstack(clip[:2]))
    assert np.array_equal(clips.strip(clip[:1]), clip[0])


def test_a_sheet_shows_some_frames_and_the_moving_one_all():
    clip, picture = moving(5), moving(1)[0]
    rows = [Sampled("a", {"clip": clip, "picture": picture}), Sampled("b", {"clip": clip[:2], "picture": picture})]
    sheet, cells = evaluation.sheet(rows)
    assert [cell.width for cell in cells] == [4 * 48, 48, 2 * 48, 48]
    assert np.array_equal(sheet[cells[0].top :][:32, cells[0].left :][:, :48], clip[0])
    shown = evaluation.moving_sheet(rows)
    assert len(shown) == 5
    still = [Sampled(row.caption, {"clip": row.pictures["clip"][-1], "picture": picture}) for row in rows]
    assert np.array_equal(shown[-1], evaluation.sheet(still)[0])  # the shorter clip ends with a still
    assert evaluation.moving_sheet(still) is None
    assert evaluation.moving_sheet([Sampled("a", {"clip": clip[:1]})]) is None  # a clip of one frame is a picture


def test_a_moving_sheet_of_too_many_pixels_is_smaller_and_says_so(monkeypatch, tmp_path):
    clip = moving(5)
    rows = [Sampled(name, {"clip": clip, "first": clip[0]}, fps=8.0) for name in "ab"]
    whole = evaluation.moving_sheet(rows)
    assert evaluation.show(rows, tmp_path / "a.png", 1, Tracker()) == ""
    monkeypatch.setattr(clips, "MAX_PIXELS", 5 * 4 * 32 * 48 // 4)
    smaller = evaluation.moving_sheet(rows)
    assert smaller.shape[1] < whole.shape[1]
    assert smaller.shape[2] < whole.shape[2]
    halved = {"clip": clip[:, ::2, ::2], "first": clip[0, ::2, ::2]}
    assert np.array_equal(smaller, evaluation.moving_sheet([Sampled(name, halved) for name in "ab"]))
    assert "one pixel of 2 x 2" in evaluation.show(rows, tmp_path / "b.png", 1, Tracker())
    shown, _ = played((tmp_path / "b.mp4").read_bytes())
    assert shown.shape[:3] == (5, *(side + side % 2 for side in smaller.shape[1:3]))


@pytest.mark.parametrize("fps", [1e-9, 0.004])
def test_a_frame_is_shown_ten_minutes_at_most(fps):
    clip, seconds = moving(2), min(600, 1 / fps)
    for encode in (clips.encode_gif, clips.encode_webp):
        with Image.open(io.BytesIO(encode(clip, fps))) as image:
            image.seek(1)
            image.load()
            assert image.info["duration"] == pytest.approx(1000 * seconds, rel=0.01)
    assert played(clips.encode_mp4(clip, fps))[1][2] == pytest.approx(1 / seconds, rel=0.01)


class Moving(Denoiser):
    """Shows its pictures as clips that grow dark."""

    def sample(self, held_out):
        return [
            Sampled(row.caption, {name: np.stack([one, one // 2]) for name, one in row.pictures.items()}, fps=4.0)
            for row in super().sample(held_out)
        ]


@pytest.mark.integration
def test_a_run_writes_its_samples_as_clips(tmp_path):
    shard = write_shard(tmp_path / "a.tar", 8, (17, 17))
    settings = tiny_settings(tmp_path, shard, updates=2, save_every=2, validation_samples=3, tensorboard=True)
    assert Moving(make_config(Moving.Config, settings)).run() == 0
    folder = tmp_path / "tiny"
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {"00000002.png", "00000002.mp4", "00000002.webp"}
    shown, stream = played((folder / "samples" / "00000002.mp4").read_bytes())
    assert (len(shown), stream[2]) == (2, 4.0)
    assert shown[1].mean() < shown[0].mean()
    assert len(pictures.read_cells(folder / "samples" / "00000002.png")) > 0
