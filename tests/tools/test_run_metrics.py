"""Curves of metrics: what a plain reading of the file gives, while it grows, breaks off and begins to differ."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.made_up_runs import lines, write_lines
from tools import run_metrics
from tools.run_metrics import Metrics
from warpcore.metrics import Metrics as Written
from warpcore.processes import Processes


def reader(path: Path, batch_size: float = math.nan) -> Metrics:
    def read(offset: int, size: int) -> bytes:
        return path.read_bytes()[offset : offset + size] if path.exists() else b""

    return Metrics(lambda: path.stat().st_size if path.exists() else 0, read, lambda: batch_size)


def points(metrics: Metrics, name: str, **more) -> list[tuple]:
    found = metrics.curve(name, more.pop("by_time", False), more.pop("buckets", 10**9), **more)
    return list(zip(found["x"], found["mean"], strict=True))


def plain(path: Path, name: str) -> list[tuple]:
    """Of whole lines, by json alone."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["update"], pytest.approx(line[name], rel=1e-6)) for line in found if name in line]


@pytest.mark.parametrize("block_bytes", [300, 2**24])
def test_curves_are_those_of_a_plain_reading(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(run_metrics, "BLOCK_BYTES", block_bytes)
    path, chance = tmp_path / "metrics.jsonl", random.Random(0)
    written = lines(200)
    for line in written[9::10]:
        line |= {"validation_loss": chance.gauss(0, 1e5), "grad_norm/a.b (c)*": -chance.random() * 1e-9}
    write_lines(path, written)
    metrics = reader(path)
    for name in ("loss", "validation_loss", "grad_norm/a.b (c)*", "lr"):
        assert points(metrics, name) == plain(path, name)
    assert set(metrics.names) == {
        "loss", "lr", "samples_seen", "samples_per_second", "validation_loss", "grad_norm/a.b (c)*",
    }  # fmt: skip
    assert points(metrics, "raw_loss") == []


def test_a_file_that_grows_is_followed_and_a_half_written_line_is_waited_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = reader(path)
    assert points(metrics, "loss") == []
    for end in range(1, 30, 7):
        write_lines(path, lines(end, first=max(1, end - 6)), "a")
        assert points(metrics, "loss") == plain(path, "loss")
    whole = json.dumps(lines(30)[-1]) + "\n"
    before = path.read_bytes()
    for cut in range(1, len(whole), 17):
        path.write_bytes(before + whole[:cut].encode())
        assert points(metrics, "loss")[-1][0] == 29
    path.write_bytes(before + whole.encode())
    assert points(metrics, "loss") == plain(path, "loss")
    assert metrics.last["update"] == 30


def test_what_is_added_to_the_last_line_after_it_was_read_is_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, lines(12))
    metrics = reader(path)
    assert points(metrics, "validation_loss") == []
    _main(path).extend(12, {"validation_loss": 0.5})
    assert points(metrics, "validation_loss") == [(12, 0.5)]
    assert "validation_loss" in metrics.names
    write_lines(path, lines(14, first=13), "a")
    assert points(metrics, "validation_loss") == [(12, 0.5)]


def test_a_run_that_went_on_from_an_earlier_update_is_read_from_scratch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, lines(40))
    metrics = reader(path)
    points(metrics, "loss")
    _main(path).resume(24)
    write_lines(path, lines(60, first=25, loss=7.0), "a")
    assert points(metrics, "loss") == plain(path, "loss")
    path.unlink()
    assert points(metrics, "loss") == []


def _main(path: Path) -> Written:
    return Written(path, Processes(0, 1, torch.device("cpu")), 4)


def test_lines_that_no_run_wrote_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"update": 1, "loss": 4.0}\n<script>\n{"update": 2, "loss": "3"}\n[[[\n\n{"update": 3, "loss": 1e999}\n'
        '{"update": 4, "loss": null}\n{"update": -5, "loss": 1}\n{"update": 6, "loss": 2.5}\n{"update": 7}\n',
        encoding="utf-8",
    )
    metrics = reader(path)
    assert points(metrics, "loss") == [(1, 4.0), (3, None), (4, None), (6, 2.5)]
    assert metrics.strange == 4


def test_numbers_beyond_what_an_axis_can_show_count_as_infinite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"update": {i}, "loss": {i}e{e}}}\n' for i, e in ((1, 38), (2, 307), (3, 307))), encoding="utf-8"
    )
    assert points(reader(path), "loss") == [(1, 1e38), (2, None), (3, None)]


def test_no_extreme_is_lost_where_buckets_are_few(tmp_path):
    written = lines(10_000)
    for line in written:
        line["loss"] = math.sin(line["update"])
    written[1234]["loss"], written[8000]["loss"], written[5] = 900.0, -70.0, {**written[5], "loss": None}
    write_lines(tmp_path / "metrics.jsonl", written)
    found = reader(tmp_path / "metrics.jsonl").curve("loss", False, 100)
    assert 100 <= len(found["x"]) <= 101
    assert (max(found["high"]), min(found["low"])) == (900.0, -70.0)
    assert sum(found["count"]) == 9_999
    assert found["x"][-1] == 10_000
    near = reader(tmp_path / "metrics.jsonl").curve("loss", False, 100, start=1200, end=1299)
    assert (near["x"][0], near["x"][-1]) == (1199, 1300)
    assert near["mean"][1:-1] == pytest.approx([line["loss"] for line in written[1199:1299]])


def test_time_is_that_of_training(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", lines(30))
    found = points(reader(tmp_path / "metrics.jsonl"), "loss", by_time=True)
    seconds = np.cumsum([4 / speed for speed in (8.0, 9.0, 10.0) for _ in range(10)])
    assert [x for x, _ in found] == pytest.approx(seconds.tolist(), rel=1e-6)
    older = [{key: value for key, value in line.items() if key != "samples_seen"} for line in lines(30)]
    write_lines(tmp_path / "metrics.jsonl", older)
    metrics = reader(tmp_path / "metrics.jsonl", batch_size=4)
    assert [x for x, _ in points(metrics, "loss", by_time=True)] == pytest.approx(seconds.tolist(), rel=1e-6)


def test_a_sketch_of_a_long_file_has_lines_from_all_over_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, lines(100))
    metrics = reader(path)
    assert metrics.sketch() is metrics
    write_lines(path, lines(20_000))
    sketch = reader(path).sketch()
    updates, losses = sketch.column("loss")
    assert 1_000 < len(updates) < 10_000
    assert losses.tolist() == pytest.approx((1 / updates).tolist())
    assert np.diff(updates).max() < 200
    assert updates[0] < 20
    assert updates[-1] > 19_980
    exact = dict(zip(*map(np.ndarray.tolist, reader(path).seconds()), strict=True))
    roughly = dict(zip(*map(np.ndarray.tolist, sketch.seconds()), strict=True))
    assert all(abs(roughly[update] - exact[update]) < 0.1 * exact[20_000] for update in roughly)
