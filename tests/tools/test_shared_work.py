"""Data tools do the same work on any number of processes, and end together."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import tools.build_dataset
import tools.index_dataset
from tests.many_processes import launch_processes
from tests.warpcore.data.tars import picture, write_shard
from tests.warpcore.data.videos import video
from tests.warpcore.runs import torchrun
from tools.build_dataset import build_dataset
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import INDEX_SUFFIX
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

TOOLS = Path(__file__).parents[2] / "tools"


def run(count: int, tool: str, *arguments: object) -> tuple[int, str]:
    """Exit status and output of a tool that torchrun starts `count` times."""
    command = [sys.executable, *torchrun(count), str(TOOLS / tool), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(40):
        path = folder / f"part{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(16 + number, 12)[: 300 if number % 7 == 0 else None])
        path.with_suffix(".txt").write_text("word " * (100 if number == 5 else number % 2))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Indexes and manifest hold times of change, too."""
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


@pytest.mark.parametrize(
    "limit", [["--samples-per-shard", "5"], pytest.param(["--shard-size", "9k"], marks=pytest.mark.slow)]
)
def test_three_processes_build_the_same_tars_as_one(folder, tmp_path, limit):
    settings = {"samples_per_shard": 5} if limit[1] == "5" else {"shard_size_bytes": 9000}
    report = build_dataset(folder, tmp_path / "alone", **settings)
    status, output = run(3, "build_dataset.py", folder, tmp_path / "together", *limit)
    assert status == 0, output
    assert str(report) in output
    assert output.count("kept 34 pictures") == 1
    alone, together = contents(tmp_path / "alone"), contents(tmp_path / "together")
    assert len(alone) > 4
    assert alone == together
    names = {path.name for path in (tmp_path / "together").iterdir()}
    assert names == {*together, *(name + INDEX_SUFFIX for name in together), MANIFEST_NAME}


@pytest.mark.slow
def test_two_processes_pack_videos_as_one_does(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.mp4").write_bytes(video(4 + number)[: 700 if number == 3 else None])
        (folder / f"{number}.txt").write_text(f"{number} brightens")
    report = build_dataset(folder, tmp_path / "alone", samples_per_shard=2)
    arguments = [folder, tmp_path / "together", "--samples-per-shard", "2"]
    launch_processes(2, call, tools.build_dataset.main, arguments, tmp_path / "said")
    assert str(report) in (tmp_path / "said.0").read_text()
    alone, together = contents(tmp_path / "alone"), contents(tmp_path / "together")
    assert len(alone) == 3
    assert alone == together


def call(tool: Callable, arguments: list, said: Path) -> None:
    """A tool in one of several processes; what it says, and the error that it ends with, go to `said`.RANK."""
    with said.with_suffix(f".{os.environ['RANK']}").open("w") as file, redirect_stdout(file):
        try:
            tool(list(map(str, arguments)))
        except (UserError, ValueError) as error:
            print(f"{type(error).__name__}: {error}")


def _build_with_a_broken_disk(arguments: list, said: Path) -> None:
    def broken(entry):
        raise ValueError("this disk is broken")

    if os.environ["RANK"] == "1":
        *others, _ = tools.build_dataset._load_all.__defaults__
        tools.build_dataset._load_all.__defaults__ = (*others, broken)
    call(tools.build_dataset.main, arguments, said)


@pytest.mark.slow
def test_where_one_process_fails_all_end_and_nothing_is_left(folder, tmp_path):
    launch_processes(2, _build_with_a_broken_disk, [folder, tmp_path / "out"], tmp_path / "said")
    main, other = ((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    assert main.startswith("UserError: another process failed: process 1 on ")
    assert "ValueError: this disk is broken" in main
    assert other == "ValueError: this disk is broken\n"
    assert not (tmp_path / "out").exists()


def test_two_processes_index_all_tars_once_and_name_the_bad_ones(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"{number}.tar", 3, first=3 * number)
    (folder / "bad.tar").write_bytes(b"no tar" * 200)
    launch_processes(2, call, tools.index_dataset.main, [folder, "--workers", "1"], tmp_path / "said")
    main, other = ((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    assert main.count("5 tars, ") == 1
    assert "12 samples, 0 of them without a usable picture" in main
    assert "UserError: 1 tars can't be used:" in main
    assert "bad.tar is not a tar" in main
    assert other.startswith("UserError: another process failed: process 0 on ")
    assert {path.name for path in folder.iterdir()} == {
        "bad.tar", MANIFEST_NAME, *(f"{number}.tar{suffix}" for number in range(4) for suffix in ("", INDEX_SUFFIX)),
    }  # fmt: skip
