"""Runs on clips and pictures, in micro-batches of unequal sizes: stopped, killed, on other numbers of processes."""

import json
import re
import signal
import struct
from pathlib import Path

import pytest

from tests.many_processes import launch_processes
from tests.warpcore.data.tars import picture, write_tar
from tests.warpcore.data.videos import TABLES, moov_first, sound, video, with_frames, with_number, with_table
from tests.warpcore.runs import (
    finish,
    load_weights,
    numbers,
    read_metrics,
    signal_at,
    start,
    tiny_settings,
    torchrun,
    train_here,
)  # fmt: skip
from tests.warpcore.tiny_clips import ClipConfig, ClipDenoiser

UPDATES = 6
MIXED = {
    "bucket_config": {"32px": {1: [1.0, 3], 4: [1.0, 2], 8: [0.7, 1]}}, "micro_batches_per_update": 4,
    "batch_size": None, "image_size": 1024,
}  # fmt: skip
ONE_LENGTH = {"num_frames": 4, "batch_size": 8, "micro_batch_size": 2, "image_size": 32}


def without_frames(content: bytes, kept: int = 0) -> bytes:
    """The same MP4 with zeros for its frames, but for the first `kept` bytes."""
    begin = content.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(content[begin - 8 : begin - 4], "big")
    return content[: begin + kept] + bytes(end - begin - kept) + content[end:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of 3 to 12 frames, pictures, and a video that can't be decoded, though its header is whole."""
    members = [(f"{n:03d}.mp4", video(3 + n, (48, 32) if n % 2 else (32, 32))) for n in range(10)]
    members += [(f"{n:03d}.png", picture(32, 40, "PNG")) for n in range(10, 16)]
    members += [("016.mp4", without_frames(video(9, (32, 32))))]
    return write_tar(tmp_path_factory.mktemp("clips") / "a.tar", members)


def settings_of(folder: Path, data: Path, kind: dict) -> dict:
    return tiny_settings(folder, data, updates=UPDATES, save_every=3, seed=1, ema_start_iters=None) | kind


def train(settings: dict) -> None:
    assert train_here(settings, ClipDenoiser, ClipConfig)[0] == 0


@pytest.fixture(scope="module", params=[MIXED, ONE_LENGTH], ids=["clips and pictures", "clips of one length"])
def whole(request, data, tmp_path_factory):
    """A run that nothing stops."""
    settings = settings_of(tmp_path_factory.mktemp("whole"), data, request.param)
    train(settings)
    return settings


def bad_samples(settings: dict) -> int:
    return json.loads((Path(settings["checkpoint_path"]) / "tiny" / "info.json").read_text())["bad_samples"]


@pytest.mark.integration
def test_a_run_of_clips_that_was_stopped_goes_on_bit_for_bit(whole, tmp_path, capfd):
    settings = whole | {"checkpoint_path": str(tmp_path)}
    train(settings | {"updates": 3})
    train(settings)
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))
    assert bad_samples(settings) == bad_samples(whole) > 0
    told = capfd.readouterr().err
    assert re.search(r"bad sample .*a\.tar/016\.mp4", told)
    if "num_frames" in whole:
        assert "10 of 17 rows can be drawn" in told
        assert "6 rejected: one frame, for which there is no bucket" in told
    assert "1 rejected: too few frames for the shortest bucket (4 frames)" in told
    assert "rows per bucket and epoch, on average: " in told


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("whole", [MIXED], indirect=True, ids=["clips and pictures"])
def test_four_and_two_processes_see_the_samples_of_one(whole, tmp_path):
    settings = whole | {"checkpoint_path": str(tmp_path)}
    launch_processes(4, train, settings | {"updates": 3})
    launch_processes(2, train, settings)
    for ours, theirs in zip(read_metrics(settings), read_metrics(whole), strict=True):
        assert (ours["samples_hash"], ours["samples_seen"]) == (theirs["samples_hash"], theirs["samples_seen"])
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    assert bad_samples(settings) == bad_samples(whole)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("whole", [MIXED], indirect=True, ids=["clips and pictures"])
def test_a_run_of_clips_that_was_killed_goes_on_bit_for_bit(whole, tmp_path):
    settings = whole | {"checkpoint_path": str(tmp_path)}
    script = Path(__file__).with_name("tiny_clips.py")
    process = start({key: value for key, value in settings.items() if value is not None}, script)
    signal_at(process, settings, 4, signal.SIGKILL)
    process.communicate()
    train(settings)
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))
    assert all((load_weights(settings)[name] == one).all() for name, one in load_weights(whole).items())


# Bad videos of every kind

SAMPLE_COUNT = 8
"""Of the number of frames in `stsz`, after the type."""
CUT_SHORT = r"it is cut short: it has [\d,]+ bytes, and its frames end at"
SMALL, PLAIN = (32, 32), {"bf": "0"}


def frame_bytes(content: bytes) -> list[int]:
    place = content.index(b"stsz") + 12
    count = struct.unpack_from(">I", content, place)[0]
    return list(struct.unpack_from(f">{count}I", content, place + 4))


def larger_than_said() -> bytes:
    """Frames of 512 x 512 px in a file that says 32 x 32."""
    content = video(8, (512, 512)).replace(b"\x02\x00\x02\x00\x00\x48", b"\x00\x20\x00\x20\x00\x48")
    for place in (76, 80):
        content = with_number(content, b"tkhd", place, 32 << 16)
    return content


def the_same_frame(times: int) -> bytes:
    """An MP4 whose tables place `times` frames upon the same bytes."""
    content = with_frames(video(4, SMALL, options=PLAIN), times, [])
    for box, table in {
        b"stsz": [frame_bytes(video(4, SMALL, options=PLAIN))[0], times],
        b"stsc": [1, 1, 1, 1],
        b"stco": [times, *[content.index(b"mdat") + 4] * times],
    }.items():
        content = with_table(content, [*TABLES, box], table)
    return content


AT_THE_START = {
    "cut": (lambda: moov_first(video(9, SMALL))[:-1], CUT_SHORT),
    "cut before its header": (lambda: video(9, SMALL)[:700], r"it is cut short: .* before its moov"),
    "matroska cut": (lambda: video(9, SMALL, container="matroska")[:500], "it is cut short or damaged"),
    "sound": (sound, "it has no video stream"),
    "no frame": (lambda: with_number(video(9, SMALL), b"stsz", SAMPLE_COUNT, 0), "it has no frame"),
    "more than it holds": (
        lambda: with_number(with_number(video(9, SMALL), b"stsz", 4, 1000), b"stsz", SAMPLE_COUNT, 9),
        CUT_SHORT,
    ),
    "million": (
        lambda: with_number(video(9, SMALL), b"stsz", SAMPLE_COUNT, 1_000_000),
        "it promises 1,000,000 frames",
    ),
    "8k": (lambda: with_number(video(9, SMALL), b"stsd", 40, (8192 << 16) + 8192), "its frames have 8192 x 8192 px"),
    "empty": (bytes, "empty file"),
    "text": (lambda: b"not a video" * 100, "it is no MP4"),
}
IN_TRAINING = {
    "damaged": (lambda: without_frames(video(9, SMALL)), "damaged|can't be decoded"),
    "damaged in the middle": (
        lambda: without_frames(video(9, SMALL, options=PLAIN), 680), "damaged|can't be decoded"
    ),
    "fewer frames": (
        lambda: with_frames(video(5, SMALL, options=PLAIN), 8, frame_bytes(video(5, SMALL, options=PLAIN))),
        r"it has 5 frames; number \d, counted from 0, is not there",
    ),
    "one frame 99999 times": (lambda: the_same_frame(99_999), "lie over one another|damaged|can't be decoded"),
    "larger than said": (larger_than_said, "more than 65536 pixels|can't be decoded"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A run, and its log, on videos of which ten are whole, one is too short, and each of the others is bad."""
    kinds = {name: make() for name, (make, _) in (AT_THE_START | IN_TRAINING).items()}
    members = [(f"{name}.mp4", content) for name, content in kinds.items()]
    members += [(f"whole {n}.mp4", video(5 + n, SMALL)) for n in range(10)] + [("short.mp4", video(2, SMALL))]
    folder = tmp_path_factory.mktemp("bad")
    settings = settings_of(folder / "1", write_tar(folder / "a.tar", members), ONE_LENGTH)
    settings |= {"max_picture_pixels": 2**16, "updates": 8, "save_every": 8}
    return settings, trained_alone(settings)


def trained_alone(settings: dict, launcher: tuple[str, ...] = ()) -> str:
    """What a training in processes of its own says."""
    script = Path(__file__).with_name("tiny_clips.py")
    keys = {key: value for key, value in settings.items() if value is not None}
    status, output = finish(start(keys, script, launcher), 300)
    assert status == 0, output
    return output


@pytest.mark.integration
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_videos_of_every_kind_are_named_counted_and_replaced(bad, tmp_path, num_processes):
    settings, told = bad
    if num_processes > 1:
        settings = settings | {"checkpoint_path": str(tmp_path)}
        told = trained_alone(settings, torchrun(num_processes))
        hashes = [[line["samples_hash"] for line in read_metrics(run)] for run in (settings, bad[0])]
        assert hashes[0] == hashes[1]
        assert bad_samples(settings) == bad_samples(bad[0])
    assert "15 of 26 rows can be drawn; 10 rejected: undecodable video (such as " in told
    assert "1 rejected: too few frames for the shortest bucket (4 frames)" in told
    for _, reason in AT_THE_START.values():  # of several with the same fault, one is named
        alike = "|".join(name for name, (_, other) in AT_THE_START.items() if other == reason)
        assert re.search(rf"({alike})\.mp4: {reason}", told), alike
    named = re.findall(r"bad sample \S*/a\.tar/(.*)\.mp4: (.*)", told)
    for name, (_, reason) in IN_TRAINING.items():
        assert any(name == of and re.search(reason, why) for of, why in named), name
    assert {name for name, _ in named} == set(IN_TRAINING)
    assert bad_samples(settings) == len(named)
    assert all(0 < line["loss"] < 10 for line in read_metrics(settings))
