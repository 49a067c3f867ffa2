"""An error of a run is told once, whichever of its processes meet it; the others end with it, without a traceback."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.many_processes import launch_processes
from tests.tiers import represented_by
from tests.warpcore.runs import finish, start, tiny_settings, torchrun
from warpcore.errors import UserError, clear_errors
from warpcore.peers import explained, tell_once
from warpcore.processes import start_processes, stop_processes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def _run(log: Path, fail: Callable[[], None]) -> None:
    """As a script does; what it prints, and its exit status, go to `log`."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        with clear_errors(tell_once), explained():
            try:
                fail()
            finally:
                stop_processes()
    except SystemExit as end:
        os.write(2, f"status {end.code}\n".encode())


def _in_the_config() -> None:
    raise UserError("batch_size: found 3")


def _in_all() -> None:
    start_processes("cpu")
    raise UserError("batch_size: found 3")


def _on_the_main_process() -> None:
    start_processes("cpu").on_main(lambda: _in_the_config())


def _in_one(rank: int) -> None:
    processes = start_processes("cpu")
    if processes.rank == rank:
        raise UserError("batch_size: found 3")
    processes.sum(torch.zeros(1))


def _in_the_first() -> None:
    _in_one(0)


def _in_the_second() -> None:
    _in_one(1)


@pytest.mark.parametrize("fail", [_in_the_config, _in_all, _on_the_main_process, _in_the_first, _in_the_second])
def test_an_error_is_told_once_and_ends_all_processes(tmp_path, fail):
    launch_processes(2, _run, tmp_path / "log", fail)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == ["error: batch_size: found 3", "status 2", "status 2"]


def _in_each() -> None:
    raise UserError(f"found {os.environ['RANK']}")


def test_what_no_other_process_has_told_is_told(tmp_path):
    launch_processes(2, _run, tmp_path / "log", _in_each)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == ["error: found 0", "error: found 1", "status 2", "status 2"]


LAUNCHERS = {"processes": ({"processes": 2}, ()), "torchrun": ({}, torchrun(2))}


def assert_told_once(status: int, output: str, launcher: str, named: str) -> None:
    assert status == (1 if launcher == "torchrun" else 2), output  # torchrun's own
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, output
    assert named in told[0]
    ours = output.replace(f'File "{ROOT}/.venv', "")  # torchrun's own traceback, where it is installed inside
    assert f'File "{ROOT}' not in ours, "a traceback of ours"


@pytest.mark.parametrize("launcher", represented_by("processes", of=LAUNCHERS))
def test_missing_data_is_one_message_under_every_launcher(tmp_path, launcher):
    keys, command = LAUNCHERS[launcher]
    settings = tiny_settings(tmp_path / "runs", tmp_path / "x.tar", num_workers=2) | keys
    assert_told_once(*finish(start(settings, launcher=command)), launcher, "x.tar")


CASCADE = str(ROOT / "configs/training/quickstart_c.yaml")
COMMANDS = {
    "train/train_c.py": [CASCADE, "device=cpu", "webdataset_path=/nowhere"],
    "train/train_c_lora.py": [
        str(ROOT / "configs/training/quickstart_lora.yaml"),
        "device=cpu",
        "generator_checkpoint_path=/nowhere",
    ],
    "tools/cache.py": [str(ROOT / "train/train_c.py"), CASCADE, "cache", "device=cpu", "webdataset_path=/nowhere"],
    "tools/index_dataset.py": ["/nowhere"],
    "tools/build_dataset.py": ["/nowhere", "out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_every_script_and_tool_of_several_processes_tells_an_error_once(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    process = start({}, ROOT / script, torchrun(2), tuple(COMMANDS[script]))
    assert_told_once(*finish(process, 240), "torchrun", "nowhere")
