"""The bounds that tests of hostile input rest on do hold."""

import os
import time

import numpy as np
import pytest

from tests.bounds import TooSlow, bounded


def test_what_stays_within_bounds_passes(tmp_path):
    with bounded(tmp_path):
        (tmp_path / "inside.txt").write_text("x", encoding="utf-8")


def compute():
    while True:
        sum(range(10**5))


@pytest.mark.parametrize(("work", "clock"), [(compute, "SIGPROF"), (lambda: time.sleep(60), "SIGALRM")])
def test_time_is_bounded(work, clock, tmp_path):
    with pytest.raises(TooSlow, match=clock), bounded(tmp_path, seconds=0.1):
        work()


def test_memory_is_bounded(tmp_path):
    with pytest.raises(MemoryError), bounded(tmp_path, gibibytes=0.25):
        np.zeros(2**29, np.uint8)
    np.zeros(2**29, np.uint8)  # and only inside


@pytest.mark.parametrize(
    "write",
    [
        lambda inside, outside: outside.write_text("x", encoding="utf-8"),
        lambda inside, outside: outside.mkdir(),
        lambda inside, outside: (inside / "a").rename(outside),
        lambda inside, outside: os.symlink(inside / "a", outside),
    ],
    ids=["open", "mkdir", "rename", "symlink"],
)
def test_changes_outside_are_noticed(write, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    (inside / "a").touch()
    with pytest.raises(AssertionError, match="outside"), bounded(inside):
        write(inside, outside)
