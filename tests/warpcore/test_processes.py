"""Many processes make the updates of one, find each other, stop together, and do not wait for ever."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.chaos import settings_of, write_data
from benchmarks.disturbed_runs import FIRST_UPDATES, Difference, Started, read_metrics, train
from tests.many_processes import free_port, launch_processes
from tests.warpcore.runs import finish, start, tiny_settings, write_shard
from tests.warpcore.runs import read_metrics as read_tiny_metrics
from warpcore import processes
from warpcore.config import Config, make_config
from warpcore.core import STOPPED_EARLY
from warpcore.errors import UserError
from warpcore.processes import start_processes, stop_processes

pytestmark = pytest.mark.integration

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "shards", 120)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict:
    settings = settings_of(tmp_path_factory.mktemp("alone"), data, updates=FIRST_UPDATES)
    train(settings, 1)
    return settings


@pytest.mark.bits
@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (2, {}),
        (4, {"use_fsdp": True, "fsdp_shards": 2}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(2, {"use_fsdp": True}, marks=pytest.mark.slow),
        pytest.param(4, {"use_fsdp": True, "fsdp_cpu_offload": True}, marks=pytest.mark.slow),
        pytest.param(1, {"use_fsdp": True, "fsdp_cpu_offload": True}, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_makes_the_same_updates(data, alone, tmp_path, count, changes):
    """From 4 micro-batches per process and update to 1."""
    settings = settings_of(tmp_path, data, updates=FIRST_UPDATES, **changes)
    train(settings, count)
    found = Difference.between(settings, alone)
    assert found.wrong_samples == 0
    assert found.early_loss < (1e-5 if changes or count > 1 else 1e-30)
    assert found.weights < (1e-5 if changes or count > 1 else 1e-30)


@pytest.mark.slow
@pytest.mark.bits
@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.slow), {"use_fsdp": True}])
def test_runs_on_equally_many_processes_are_equal_bit_for_bit(data, tmp_path, changes):
    runs = [settings_of(tmp_path / name, data, updates=FIRST_UPDATES, **changes) for name in ("first", "second")]
    for settings in runs:
        train(settings, 2)
    assert Difference.between(*runs) == Difference(0, 0.0, 0.0, 0.0)


@pytest.mark.slow
def test_processes_stop_together_when_one_is_asked_to(data, alone, tmp_path):
    settings = settings_of(tmp_path, data, updates=100_000)
    started = Started(settings, 2)
    wait_for_update(started, settings, 3)
    started.send(1, signal.SIGTERM)
    assert started.finish(60) == [STOPPED_EARLY] * 2
    lines = read_metrics(settings)
    assert [line["samples_hash"] for line in lines[:FIRST_UPDATES]] == [
        line["samples_hash"] for line in read_metrics(alone)[: len(lines)]
    ]
    assert (tmp_path / "run" / "state" / f"{len(lines):08d}" / "manifest.json").exists()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_stops_answering_does_not_hold_the_others_for_ever(data, tmp_path, silent):
    timeout = 5.0
    settings = settings_of(tmp_path, data, updates=100_000, process_timeout_seconds=timeout, use_fsdp=True)
    started = Started(settings, 2)
    wait_for_update(started, settings, 3)
    started.send(silent, signal.SIGSTOP)
    other = started.processes[1 - silent]
    other.join(timeout + 15)
    code = other.exitcode
    started.send(silent, signal.SIGKILL)
    started.finish(10)
    assert code == 1
    assert "gave no answer within process_timeout_seconds" in started.log.read_text()


def _take_long(rank: int, port: int, folder: Path) -> None:
    os.environ |= dict(zip(LAUNCH_VARIABLES, (str(rank), "2", "0", "127.0.0.1", str(port)), strict=True))
    run = start_processes("cpu", timeout_seconds=2)
    seconds = run.on_main_at_length(lambda: time.sleep(5) or 5)

    def refuse():
        raise UserError("no rows")

    try:
        run.on_main_at_length(refuse)
    except UserError as error:
        (folder / str(rank)).write_text(f"{seconds} {error}")
    stop_processes()


@pytest.mark.slow
def test_what_takes_the_main_process_longer_than_the_others_wait_is_waited_for(tmp_path):
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    started = [context.Process(target=_take_long, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["5 no rows"] * 2


class _SilentStore(dist.Store):
    """What a process meets the others with; it stops for good once it has said where it can be reached."""

    def __init__(self, store: dist.Store):
        super().__init__()
        self._store = store

    def set(self, key, value):
        self._store.set(key, bytes(value))
        os.kill(os.getpid(), signal.SIGSTOP)


def _meet(rank: int, port: int, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= dict(zip(LAUNCH_VARIABLES, (str(rank), "2", "0", "127.0.0.1", str(port)), strict=True))
    if rank == 1:
        meeting_point = processes._meeting_point
        processes._meeting_point = lambda *given: _SilentStore(meeting_point(*given))
    start_processes("cpu", timeout_seconds=2)


def test_a_process_that_falls_silent_while_they_meet_does_not_hold_the_others(tmp_path):
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    started = [context.Process(target=_meet, args=(rank, port, tmp_path / "log.txt")) for rank in range(2)]
    for process in started:
        process.start()
    started[0].join(60)
    code = started[0].exitcode
    for process in started:
        process.kill()
        process.join()
    assert code == 1
    told = (tmp_path / "log.txt").read_text()
    assert "within 2 s (process_timeout_seconds): one ended, gave no answer or never came" in told


DYING = """
import os, signal
from tests.warpcore.tiny import Denoiser

class Dying(Denoiser):
    def loss(self, clean, random):
        if self.update == 5 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(clean, random)

Dying.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--standalone",), ("--master-port", "29507")])
def test_torchrun_starts_a_run_again_that_lost_a_process(tmp_path, options):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 10), updates=10, batch_size=4)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", *options)
    status, output = finish(start(settings, script, launcher))
    assert status == 0, output
    assert [line["update"] for line in read_tiny_metrics(settings)] == list(range(1, 11))


def wait_for_update(started: Started, settings: dict, update: int) -> None:
    for _ in range(6000):
        lines = read_metrics(settings)
        if lines and lines[-1]["update"] >= update:
            return
        assert started.running, started.log.read_text()
        started.processes[0].join(0.01)
    raise AssertionError(f"no update {update} within a minute: {started.log.read_text()}")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK set but not WORLD_SIZE, LOCAL_RANK: launch with torchrun, or unset them"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE is 'two', not a number"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            "not SLURM_LOCALID, SLURM_JOB_ID, .*: start .* with srun",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "process 2 of 2: ranks go from 0 to 1",
        ),
        (SRUN, r"can't ask Slurm for the first node: .*Export its MASTER_ADDR before srun"),
        (SRUN | {"MASTER_ADDR": "127.0.0.1"}, "fsdp_shards: 3 does not divide the 2 processes; write one of 1, 2"),
    ],
)
def test_launch_variables_that_are_not_whole_are_named(monkeypatch, variables, message):
    for name in (*LAUNCH_VARIABLES, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "")  # no scontrol
    with pytest.raises(UserError, match=message):
        start_processes("cpu", use_fsdp=True, fsdp_shards=3)


@pytest.mark.parametrize("name_resolves", [True, False])
def test_processes_of_srun_meet_at_the_first_node_of_the_list(tmp_path, name_resolves):
    scontrol = tmp_path / "scontrol"
    name = "localhost" if name_resolves else "node1.invalid"
    scontrol.write_text(
        f"#!/bin/sh\n[ $2 = hostnames ] && [ $3 = 'node[1-2]' ] && printf '{name}\\nnode2\\n'\n"
        f"[ $2 = node ] && [ $3 = {name} ] && echo 'NodeName={name} NodeAddr=127.0.0.1 NodeHostName=x'\n"
        "true\n"
    )
    scontrol.chmod(0o755)
    port = free_port()
    arguments = str(tmp_path), "localhost" if name_resolves else "127.0.0.1", 12_000 + port - 20_000, port
    launch_processes(2, _meet_as_srun, *arguments)


def _meet_as_srun(scontrol_folder: str, address: str, job: int, port: int) -> None:
    rank = os.environ["RANK"]
    for name in LAUNCH_VARIABLES:
        del os.environ[name]
    os.environ |= SRUN | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_JOB_ID": str(job)}
    os.environ["PATH"] = f"{scontrol_folder}:{os.environ['PATH']}"
    processes = start_processes("cpu")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, str(port))
    assert processes.sum(torch.tensor(1.0 + processes.rank)) == 3
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("changes", [{"fsdp_shards": 2}, {"fsdp_cpu_offload": True}])
def test_settings_of_sharding_without_sharding_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match="fsdp_shards and fsdp_cpu_offload need use_fsdp: true"):
        make_config(Config, settings_of(tmp_path, tmp_path, updates=1, **changes))
