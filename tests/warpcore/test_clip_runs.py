"""Runs on clips and pictures, in micro-batches of unequal sizes: stopped, killed, on other numbers of processes."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.many_processes import launch_processes
from tests.warpcore.data.tars import picture, write_tar
from tests.warpcore.data.videos import video
from tests.warpcore.runs import load_weights, numbers, read_metrics, signal_at, start, tiny_settings, train_here
from tests.warpcore.tiny_clips import ClipConfig, ClipDenoiser

UPDATES = 6
MIXED = {
    "bucket_config": {"32px": {1: [1.0, 3], 4: [1.0, 2], 8: [0.7, 1]}}, "micro_batches_per_update": 4,
    "batch_size": None, "image_size": 1024,
}  # fmt: skip
ONE_LENGTH = {"num_frames": 4, "batch_size": 8, "micro_batch_size": 2, "image_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of 3 to 12 frames, pictures, and a video that can't be decoded, though its header is whole."""
    members = [(f"{n:03d}.mp4", video(3 + n, (48, 32) if n % 2 else (32, 32))) for n in range(10)]
    members += [(f"{n:03d}.png", picture(32, 40, "PNG")) for n in range(10, 16)]
    damaged = bytearray(video(9, (32, 32)))
    begin = damaged.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(damaged[begin - 8 : begin - 4], "big")
    damaged[begin:end] = bytes(end - begin)
    members += [("016.mp4", bytes(damaged))]
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
