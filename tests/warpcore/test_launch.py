"""`processes: N` starts that many processes, which end as one script would."""

import signal
from pathlib import Path

import pytest
import torch

from tests.tiers import represented_by
from tests.warpcore.runs import (
    finish,
    read_metrics,
    signal_at,
    start,
    tiny_settings,
    torchrun,
    train_here,
    write_shard,
)
from warpcore.errors import UserError
from warpcore.launch import launch, planned_processes
from warpcore.signals import STOPPED_EARLY

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def alone(monkeypatch):
    """No launcher around."""
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 12), micro_batch_size=2)


@pytest.mark.integration
@pytest.mark.parametrize("first", represented_by("processes", of=["processes", "torchrun"]))
def test_a_run_is_stopped_and_goes_on_under_the_other_launcher(settings, first):
    ways = {"processes": ({"processes": 2}, ()), "torchrun": ({}, torchrun(2))}
    keys, launcher = ways.pop(first)
    slow = settings | {"seconds_per_micro_batch": 0.05, "updates": 1000}
    process = start(slow | keys, launcher=launcher)
    signal_at(process, slow, 3, signal.SIGTERM if first == "processes" else signal.SIGINT)
    status, output = finish(process)
    if first == "processes":
        assert status == STOPPED_EARLY, output
    stopped = len(read_metrics(settings))
    assert 3 <= stopped < 1000
    ((keys, launcher),) = ways.values()
    status, output = finish(start(settings | keys | {"updates": stopped + 3}, launcher=launcher))
    assert status == 0, output
    assert f"is at update {stopped}" in output
    assert output.count("is at update") == 1  # one process tells
    lines = read_metrics(settings)
    assert [line["update"] for line in lines] == list(range(1, stopped + 4))
    status, alone = train_here(settings | {"experiment_id": "alone", "updates": stopped + 3})
    assert [line["samples_hash"] for line in alone] == [line["samples_hash"] for line in lines]


@pytest.mark.slow
@pytest.mark.integration
def test_an_error_of_the_processes_is_the_exit_status(settings):
    given = settings | {"processes": 2, "break_update": 1, "max_nonfinite_updates": 1}
    status, output = finish(start(given))
    assert status == 2, output
    assert "had a loss or gradient that is not finite" in output


@pytest.mark.integration
@pytest.mark.slow
def test_the_script_of_stage_c_is_started_twice_at_the_command_line(tmp_path):
    data = write_shard(tmp_path / "a.tar", 8, (128, 128))
    (tmp_path / "config.yaml").write_text(
        f"base: {ROOT / 'configs/training/quickstart_c.yaml'}\nwebdataset_path: {data}\nvalidation_samples: 0\n"
        f"checkpoint_path: {tmp_path}\nexperiment_id: c\nupdates: 2\nbatch_size: 4\nsample_count: 1\nlog_every: 1\n"
        "dataset_filters: []\nmulti_aspect_ratio: [1]\nsample_steps: 1\nnum_workers: 0\nprocesses: 8\n"
    )
    script, arguments = ROOT / "train" / "train_c.py", (str(tmp_path / "config.yaml"), "processes=2", "device=cpu")
    status, output = finish(start({}, script=script, arguments=arguments), 240)
    assert status == 0, output
    lines = read_metrics({"checkpoint_path": str(tmp_path), "experiment_id": "c"})
    assert [line["update"] for line in lines] == [1, 2]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 3),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1",
          "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1"}, 2),
    ],
)  # fmt: skip
def test_another_launcher_with_another_number_is_refused(alone, monkeypatch, variables, wanted):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    started = int(variables.get("WORLD_SIZE") or variables["SLURM_STEP_NUM_TASKS"])
    with pytest.raises(UserError, match=rf"processes: {wanted} asks for {wanted}.* has started {started}: write "):
        launch(wanted, "cpu")
    assert launch(started, "cpu") is None
    assert launch(None, "cpu") is None


def test_all_is_one_for_each_gpu(alone, monkeypatch):
    with pytest.raises(
        UserError, match="processes: all means one for each GPU, and none is used here: write a number"
    ):
        launch("all", "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch("all", "auto") is None
    with pytest.raises(UserError, match="processes: 2, but this machine has 1 GPUs"):
        launch(2, "cuda")
    assert launch(1, "cpu") is None


def test_tools_plan_for_the_processes_of_the_config():
    assert [planned_processes(*given) for given in ((None, None), (None, 8), (4, None), (4, "all"), (8, 8))] == [
        1, 8, 4, 4, 8,
    ]  # fmt: skip
    with pytest.raises(UserError, match="--processes 4 contradicts processes: 8 of the config"):
        planned_processes(4, 8)
    with pytest.raises(UserError, match=r"say how many \(--processes 8\)"):
        planned_processes(None, "all")
