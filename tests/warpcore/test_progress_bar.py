"""What progress bars write: a line that moves in a terminal, whole lines at a calm rate in a log."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
import tqdm.std

from warpcore import progress_bar
from warpcore.progress import Progress
from warpcore.progress_bar import ProgressBar

ROOT = Path(__file__).parents[2]
LINE = {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0, "samples_per_second": 8.0, "data_wait": 0.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test lets pass."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_a_log_gets_whole_lines_at_a_calm_rate_and_a_last_one(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    progress = Progress(True, 100, 0, torch.device("cpu"))
    for update in range(1, 101):
        clock[0] += 1
        progress.show(LINE | {"update": update})
        if update == 50:
            progress.say("update 50: samples in x.png")
    progress.close()
    progress.close()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert [re.match(r" *(\d+)%\|", line) is not None for line in lines] == [True, False, True, True, True]
    assert lines[1] == "update 50: samples in x.png"
    assert "100/100" in lines[-1]
    assert "loss 0.5000" in lines[-1]


def test_work_that_ends_before_its_bar_is_due_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(ProgressBar(range(3), delay=2)) == [0, 1, 2]
    assert list(ProgressBar(range(3), disable=True)) == [0, 1, 2]
    assert log.getvalue() == ""
    assert list(ProgressBar(range(3), desc="drawing")) == [0, 1, 2]
    assert re.fullmatch(r"drawing: 100%\|.*\| 3/3 .*\n", log.getvalue())


def test_in_a_terminal_one_line_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(ProgressBar(range(3), mininterval=0)) == [0, 1, 2]
    assert terminal.getvalue().count("\r") >= 3
    assert terminal.getvalue().count("\n") == 1


def test_nothing_else_draws_bars():
    folders = ("warpcore", "families", "tools", "inference", "train", "models", "modules")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if "tqdm" in path.read_text(encoding="utf-8")] == ["progress_bar.py"]
