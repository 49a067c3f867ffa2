"""`fit: 12GB`: a run begins with the cheapest keys that fit the GPU, and learns the same with them."""

import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.train.test_every_script import files, settings, train, use_case  # noqa: F401
from tests.warpcore.runs import (
    finish,
    load_weights,
    numbers,
    read_metrics,
    start,
    tiny_settings,
    train_here,
    write_shard,
)
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.fitting import AT_START, _sent_activations, _swapped
from warpcore.planning import GIB, USABLE, Plan, fitted
from warpcore.processes import alone, launched
from warpcore.signals import STOPPED_EARLY

pytestmark = pytest.mark.integration
SCRIPTS = [
    "train_c_controlnet", "train_dit", "train_pixart_lora", "train_cosmos_lora", "train_stdit", "train_nova",
]  # fmt: skip


def card(needed: float) -> str:
    """The smallest GPU that has room for `needed` bytes."""
    return f"{1.0001 * needed / USABLE / GIB:.12f}GB"


def test_a_run_of_two_processes_chooses_what_is_enough_and_learns_the_same(tmp_path):
    data = write_shard(tmp_path / "data.tar", 16)
    given = tiny_settings(tmp_path, data, updates=3, save_every=3, processes=2)
    needs = Plan(Denoiser, make_config(TinyConfig, given), "cpu", 2).needs({})
    plain, small = (given | {"experiment_id": name} for name in ("plain", "small"))
    assert finish(start(plain))[0] == 0
    status, told = finish(start(small | {"fit": card(needs.total - needs.ema)}))
    assert status == 0, told
    assert told.count("counting on shapes") == told.count("for each process, with ema_device=cpu\n") == 1
    assert "\n- ema_device=cpu: the device waits when the average moves (ema_iters)" in told
    assert "\nfit: on CPU, what should wait in the CPU's memory frees nothing" in told
    assert numbers(read_metrics(plain)) == numbers(read_metrics(small))
    theirs, ours = (load_weights(one, "generator_ema") for one in (plain, small))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_learn_the_same_on_the_smallest_gpu(settings, name):  # noqa: F811
    kind = use_case(name)
    plain, small = (settings(name, run, updates=2) for run in ("plain", "small"))
    _, _, least = Plan(kind, make_config(kind.Config, plain), "cpu", changes=AT_START).cheapest(0)
    ours, theirs = (train(name, one) for one in (small | {"fit": card(least.total)}, plain))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    for file, tensors in files(plain).items():
        torch.testing.assert_close(files(small)[file], tensors, rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_counts_with_its_own_micro_batches(tmp_path, capsys):
    """Those of its checkpoint stay, whatever the config says later."""
    data = write_shard(tmp_path / "data.tar", 16)
    given = tiny_settings(tmp_path, data, updates=2, save_every=2, batch_size=8)
    needs = Plan(Denoiser, make_config(TinyConfig, given | {"micro_batch_size": 2}), "cpu").needs({})
    train_here(given | {"micro_batch_size": 2})
    train_here(given | {"updates": 3, "fit": card(needs.total)})
    assert "with the config as it is\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="write a smaller micro_batch_size"):
        train_here(given | {"experiment_id": "new", "fit": card(needs.total)})


def test_keys_that_nobody_wrote_stay_known(tmp_path):
    """As a run that began before a key existed goes on with what was computed then."""
    written = tiny_settings(tmp_path, tmp_path)
    config = make_config(TinyConfig, written)
    with_keys = Plan(Denoiser, config, "cpu").with_keys({"ema_device": "cpu"})
    assert with_keys.model_fields_set == config.model_fields_set | {"ema_device"}
    assert with_keys.ema_device == "cpu"


def test_what_no_change_makes_fit_is_refused_with_what_to_write(tmp_path):
    config = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit="0.000001GB"))
    problem = r"^fit: of 1e-06 GiB, .* are usable, and the least .* GiB: write a smaller micro_batch_size, "
    with pytest.raises(UserError, match=problem):
        fitted(Denoiser(config), None)


def test_a_refusal_gives_the_command_that_searches_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/tiny.py", "my config.yaml", "batch_size=1", "fit=0.000001GB"])
    config = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, batch_size=1, fit="0.000001GB"))
    command = (
        "write one of the changes of other kinds that this finds: python3 tools/memory.py train/tiny.py "
        "'my config.yaml' batch_size=1 fit=0.000001GB --processes 1 --gpu-memory 1e-06 --device cpu"
    )
    with pytest.raises(UserError, match=f"{re.escape(command)}$"):
        fitted(Denoiser(config), None)


def test_a_signal_ends_counting(tmp_path, capsys):
    config = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit="0.000001GB"))
    asked = iter([False, True])
    with pytest.raises(SystemExit) as ended:
        fitted(Denoiser(config), None, lambda: next(asked))
    assert ended.value.code == STOPPED_EARLY
    assert capsys.readouterr().err.endswith("fit: stopped while it counted; the same command counts again\n")


def test_every_change_that_writes_checkpointing_says_what_that_costs():
    run = SimpleNamespace(
        config=SimpleNamespace(offload=[], activation_checkpointing=0, swap_blocks=0),
        processes=1, levels=(0, 1, 2, 3), swappable=2,
    )  # fmt: skip
    for change in (_sent_activations, _swapped):
        assert "activation_checkpointing" in change(run)[-1]
        (cost,) = (one.cost for one in AT_START if one.options is change)
        assert cost.startswith("blocks compute twice")


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


@pytest.mark.parametrize("written", ["12MB", "-1GB", "all", "1e12", "nan", "12,5GB", "１２GB", ""])
def test_other_sizes_in_words_are_refused_with_what_to_write(tmp_path, written):
    with pytest.raises(ConfigError, match=r"fit: found .* in GB, such as 12GB, 11\.5GB or 0\.5GB"):
        make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit=written))


@pytest.mark.parametrize("written", ["0GB", -1, 1e12, [12], {"gib": 12}, True])
def test_other_sizes_are_refused(tmp_path, written):
    with pytest.raises(ConfigError, match="fit"):
        make_config(TinyConfig, tiny_settings(tmp_path, tmp_path, fit=written))
