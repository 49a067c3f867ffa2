"""Data tools do the same work on any number of processes, and end together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warpcore.data.tars import picture, write_shard
from tests.warpcore.runs import torchrun
from tools.build_dataset import build_dataset
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import INDEX_SUFFIX

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


def test_where_one_process_fails_all_end_and_nothing_is_left(folder, tmp_path):
    code = (
        "import os, sys; from tools import build_dataset as tool; from warpcore.errors import run_script\n"
        "def broken(entry): raise ValueError('this disk is broken')\n"
        "if os.environ['RANK'] == '1': tool._load_all.__defaults__ = (*tool._load_all.__defaults__[:2], broken)\n"
        "run_script(tool.main)"
    )
    script = tmp_path / "broken.py"
    script.write_text(code)
    status, output = run(2, script, folder, tmp_path / "out")
    assert status != 0
    assert "error: another process failed: process 1 on " in output
    assert "ValueError: this disk is broken" in output
    assert list((tmp_path / "out").iterdir()) == []


def test_two_processes_index_all_tars_once_and_name_the_bad_ones(tmp_path):
    for number in range(5):
        write_shard(tmp_path / f"{number}.tar", 3, first=3 * number)
    status, output = run(2, "index_dataset.py", tmp_path, "--workers", "1")
    assert status == 0, output
    assert output.count("5 tars, ") == 1
    assert "15 samples, 0 of them without a usable picture" in output
    assert len(list(tmp_path.glob(f"*{INDEX_SUFFIX}"))) == 5
    assert (tmp_path / MANIFEST_NAME).exists()
    (tmp_path / "5.tar").write_bytes(b"no tar" * 200)
    write_shard(tmp_path / "6.tar", 3, first=90)
    status, output = run(2, "index_dataset.py", tmp_path, "--workers", "1")
    assert status != 0
    assert "7 tars, " in output
    assert "1 tars can't be used:" in output
    assert "5.tar is not a tar" in output
    assert (tmp_path / f"6.tar{INDEX_SUFFIX}").exists()
