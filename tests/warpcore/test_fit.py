"""`fit: 12GB`: a run begins with the cheapest keys that fit the GPU, and learns the same with them."""

import os

import pytest
import torch

from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, files, settings, train, use_case  # noqa: F401
from tests.warpcore.runs import finish, load_weights, numbers, read_metrics, start, tiny_settings, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.fitting import SAME_UPDATES
from warpcore.planning import GIB, USABLE, Plan, fitted
from warpcore.processes import alone, launched

pytestmark = pytest.mark.integration


def card(needed: float) -> str:
    """The smallest GPU that has room for so many bytes."""
    return f"{1.0001 * needed / USABLE / GIB:.12f}GB"


def test_a_run_chooses_what_is_enough_and_learns_the_same(tmp_path):
    """Each of two processes counts, before they have met."""
    data = write_shard(tmp_path / "data.tar", 16)
    given = tiny_settings(tmp_path, data, updates=3, save_every=3, processes=2)
    needs = Plan(Denoiser, make_config(TinyConfig, given), "cpu", 2).needs({})
    assert finish(start(given | {"experiment_id": "all_of_it"}))[0] == 0
    status, told = finish(start(given | {"experiment_id": "fitted", "fit": card(needs.total - needs.ema)}))
    assert status == 0, told
    assert told.count("fit: counting on shapes") == told.count("usable GiB with ema_device=cpu\n") == 1
    assert "\n- ema_device=cpu: the device waits when the average moves (ema_iters)" in told
    one, other = (given | {"experiment_id": name} for name in ("all_of_it", "fitted"))
    assert numbers(read_metrics(one)) == numbers(read_metrics(other))
    assert all(
        map(torch.equal, load_weights(one, "generator_ema").values(), load_weights(other, "generator_ema").values())
    )


@pytest.mark.parametrize("name", represented_by("train_pixart_lora", of=SETTINGS))
def test_every_script_learns_the_same_on_the_smallest_gpu(settings, name):  # noqa: F811
    kind = use_case(name)
    plain, small = (settings(name, run, updates=2) for run in ("plain", "small"))
    _, _, least = Plan(kind, make_config(kind.Config, plain), "cpu", changes=SAME_UPDATES).cheapest(0)
    config = fitted(kind, make_config(kind.Config, small | {"fit": card(least.total)}))
    assert kind(config).run() == 0
    assert [line["loss"] for line in read_metrics(small)] == pytest.approx(
        [line["loss"] for line in train(name, plain)], rel=1e-5
    )
    ours, theirs = files(small), files(plain)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        torch.testing.assert_close(ours[file], tensors, rtol=1e-4, atol=1e-5)


def test_what_no_change_makes_fit_is_refused_with_what_to_write(tmp_path):
    config = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit="0.000001GB"))
    with pytest.raises(
        UserError, match=r"^fit: 1e-06 GiB, of which .* are usable: the least .* Write a smaller micro"
    ):
        fitted(Denoiser, config)


def test_graphs_exclude_what_moves_memory(tmp_path):
    plan = Plan(Denoiser, make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, compile="graphs")), "cuda")
    assert plan.allows({"ema_device": "cpu"})
    assert not plan.allows({"offload": ["encoders"]})
    assert not plan.allows({"use_fsdp": True, "fsdp_cpu_offload": True})


def test_the_process_that_counts_asks_no_other(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    with alone():
        assert launched() == (0, 1, 0)


@pytest.mark.parametrize(
    ("written", "gib"), [("12GB", 12), ("12 GiB", 12), ("11.5gb", 11.5), ("8g", 8), (24, 24), ("24", 24)]
)
def test_memory_is_written_as_cards_are_sold(tmp_path, written, gib):
    assert make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit=written)).fit == gib


@pytest.mark.parametrize("written", ["12MB", "0GB", "-1", "all", "1e12", "nan", [12], True])
def test_other_sizes_are_refused(tmp_path, written):
    with pytest.raises(ConfigError, match="fit"):
        make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit=written))
