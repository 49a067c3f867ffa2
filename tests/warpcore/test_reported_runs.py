"""Runs in situations of public reports about other trainers: started again several times, and on other data."""

from itertools import pairwise

import pytest
import torch

from tests.warpcore.runs import load_weights, tiny_settings, train_here, write_shard

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path) -> dict:
    write_shard(tmp_path / "a.tar", 10)
    return tiny_settings(tmp_path / "runs", tmp_path / "a.tar", lr_schedule="cosine", warmup_updates=2)


def test_a_run_that_is_lengthened_twice_counts_on_and_has_the_rates_of_its_new_length(settings):
    """kohya-ss/sd-scripts#2248: the second start counted from the first one's end. kohya-ss/sd-scripts#840 and #954:
    the file of a resumed run was that of before. deepinsight/insightface#2143: rates of the length of before."""
    lines, files = [], []
    for updates in (4, 8, 12):
        status, made = train_here(settings | {"updates": updates})
        assert status == 0
        lines.append(made)
        files.append(load_weights(settings, "generator"))
    assert [line["update"] for made in lines for line in made[-4:]] == list(range(1, 13))
    assert all(any(not torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(files))
    _, whole = train_here(settings | {"experiment_id": "whole"})
    rates = [line["lr"] for line in whole]
    assert [line["lr"] for line in lines[-1][-4:]] == pytest.approx(rates[-4:])
    assert [one["samples_hash"] for made in lines for one in made[-4:]] == [one["samples_hash"] for one in whole]


def test_a_run_goes_on_from_another_one_on_a_smaller_data_set(settings, tmp_path):
    """hpcaitech/Open-Sora#635: the place in the data of before was beyond the end of the new ones."""
    assert train_here(settings | {"updates": 8})[0] == 0
    few = str(write_shard(tmp_path / "few.tar", 4, first=50))
    new = {"experiment_id": "new", "load": str(tmp_path / "runs" / "tiny"), "webdataset_path": few}
    status, lines = train_here(settings | new | {"on_data_change": "new_epoch"})
    assert (status, [line["update"] for line in lines]) == (0, [9, 10, 11, 12])
