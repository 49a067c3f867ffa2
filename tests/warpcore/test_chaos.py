"""Nothing is lost: the short version of benchmarks/chaos.py."""

import re

import pytest

import tests.many_processes  # noqa: F401  (makes processes start quickly)
from benchmarks.chaos import DAMAGE, kill_again_and_again, train_on_damaged_data
from benchmarks.disturbed_runs import COUNTS

pytestmark = pytest.mark.slow


def test_eight_kills_at_random_moments_on_random_numbers_of_processes_lose_nothing(tmp_path):
    found = kill_again_and_again(tmp_path, kills=8, seed=0)
    assert found.wrong_samples == 0
    assert found.early_loss < 1e-5
    assert found.late_loss < 1e-5
    assert found.weights < 1e-3


def test_training_goes_on_over_damaged_samples_and_tells_the_same_of_them_on_any_number_of_processes(tmp_path):
    told = {count: train_on_damaged_data(tmp_path, count) for count in COUNTS}
    assert len(set(told.values())) == 1
    one = told[1]
    unreadable = ["cut JPEG", "cut PNG", "bad JSON", "no caption in the JSON"]
    assert [source.partition(" ")[2].rpartition(".")[0] for source, _ in one.bad_samples] == unreadable
    assert one.count == len(unreadable)
    # The index knows already that these can't be drawn; a sample under a wrong extension and one without words can.
    assert set(DAMAGE) - set(unreadable) == {
        "bomb", "no picture at all", "zero bytes", "wrong extension", "empty caption",
    }  # fmt: skip
    num_whole, num_cut = 100 * len(DAMAGE), 2 * 40 + 2  # 40 samples before each cut, and a row for what is after it
    cuts = "; ".join(f"1 rejected: {tmp_path}/data/{number:06d}.tar is cut short" for number in (900, 1000))
    examples = re.compile(r" \(such as \d+ (no picture at all|zero bytes): [^()]+; encode it again, or leave it out\)")
    assert examples.search(one.rows)
    assert examples.sub("", one.rows) == (
        f"{num_whole + num_cut - 5} of {num_whole + num_cut} rows can be drawn; 2 rejected: undecodable picture; "
        f"1 rejected: more than 200000000 pixels (max_picture_pixels); {cuts}"
    )
