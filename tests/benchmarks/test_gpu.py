"""`benchmarks/gpu.py`: what a part leaves when rows fail, when it is killed, and that all parts run on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_part
from benchmarks.gpu_part import FAIL, NOT_HERE, OK, Bench, NotHere, Outcome, Part, Row, run_part, status_of
from tests.train.test_imports import UNUSED

ROOT = Path(__file__).parents[2]
GIB = 2**30


def good(bench: Bench) -> Outcome:
    return Outcome([{"figure": "1"}, {"figure": "2"}])


def off(bench: Bench) -> Outcome:
    return Outcome([{"figure": "3"}], "3 is more than 2")


def broken(bench: Bench) -> Outcome:
    raise ValueError("no figure | at all\nsecond line")


def elsewhere(bench: Bench) -> Outcome:
    raise NotHere("it needs a GPU")


def killed(bench: Bench) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)


def poisons(bench: Bench) -> Outcome:
    gpu_part._gpu_error = lambda bench: "the GPU is in an error state"
    return Outcome([])


def endless(bench: Bench) -> Outcome:
    while True:
        time.sleep(1)


def part(*measures, row_seconds: float = 240) -> Part:
    return Part("trial", "Trial", "What is measured.", ("figure",), Rows(measures), row_seconds=row_seconds)


class Rows:
    """Rows named after their functions, in a form that another process can load."""

    def __init__(self, measures):
        self.measures = measures

    def __call__(self, bench: Bench) -> list[Row]:
        return [Row(measure.__name__, measure) for measure in self.measures]


def bench_in(folder: Path, seconds: float = 120) -> Bench:
    return Bench(folder, tiny=True, deadline=time.time() + seconds, scratch=folder / "scratch", device_name="cpu")


def lines_of(folder: Path) -> list[list[str]]:
    """The cells of the table's rows."""
    text = (folder / "trial.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.mark.integration
def test_a_row_that_fails_is_marked_costs_no_other_row_and_gives_a_status(tmp_path):
    table = run_part(part(off, broken, elsewhere, good), bench_in(tmp_path))
    rows = lines_of(tmp_path)
    assert [row[0] for row in rows] == ["off", "broken", "elsewhere", "good", "good"]
    assert rows[0][1] == f"{FAIL}: 3 is more than 2"
    assert rows[0][3] == "3"  # a figure that failed its check is still told
    assert rows[1][1] == f"{FAIL}: ValueError: no figure / at all"
    assert rows[2][1] == f"{NOT_HERE}: it needs a GPU"
    assert rows[3][1] == OK
    assert "Traceback" in (tmp_path / "trial.log").read_text(encoding="utf-8")
    assert status_of([table]) == 1


@pytest.mark.slow
def test_a_part_at_its_time_limit_stops_and_names_the_rows_that_are_missing(tmp_path):
    began = time.time()
    table = run_part(part(good, endless, off), bench_in(tmp_path, seconds=20))
    assert time.time() - began < 60
    assert table.missing == ["off"]
    assert lines_of(tmp_path)[2][1].startswith(f"{FAIL}: stopped after")
    assert "2 of 3 rows, 1 failed. Missing rows: off." in (tmp_path / "trial.md").read_text(encoding="utf-8")
    assert status_of([table]) == 1


@pytest.mark.slow
def test_a_row_that_hangs_kills_its_process_or_breaks_the_gpu_costs_no_other_row(tmp_path):
    table = run_part(part(killed, poisons, endless, good, row_seconds=40), bench_in(tmp_path, seconds=300))
    assert table.status["killed"].startswith(f"{FAIL}: the process of this row died")
    assert table.status["poisons"] == f"{FAIL}: the GPU is in an error state"
    assert table.status["endless"].endswith("at the time limit of the row")
    assert table.status["good"] == OK


@pytest.mark.integration
def test_a_part_that_is_killed_leaves_a_readable_table_and_no_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.benchmarks import test_gpu as t; "
        "t.run_part(t.part(t.good, t.endless, t.off), t.bench_in(Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    log = tmp_path / "trial.log"
    deadline = time.time() + 120
    while "==== endless" not in (log.read_text(encoding="utf-8") if log.exists() else "") or not lines_of(tmp_path):
        assert process.poll() is None  # the worker may begin its next row before the last one is in the table
        assert time.time() < deadline
        time.sleep(0.1)
    workers = [int(pid) for pid in children(process.pid)]
    process.kill()
    process.wait()
    assert [row[3] for row in lines_of(tmp_path)] == ["1", "2"]
    assert "Missing rows: endless; off." in (tmp_path / "trial.md").read_text(encoding="utf-8")
    while any(is_running(pid) for pid in workers):
        assert time.time() < deadline, "a worker goes on without its parent"
        time.sleep(0.1)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_parts_load_without_the_packages_that_only_some_rows_use():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*UNUSED, 'open_clip']!r})); from benchmarks import gpu; "
        "print(*(gpu.load_part(name).name for name in gpu.PARTS))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == list(gpu.PARTS), done.stderr


def test_every_script_has_rows():
    from benchmarks.gpu_scripts import SCRIPTS

    scripts = {path.stem for path in (ROOT / "train").glob("train_*.py")}
    assert scripts == {name.split()[0] for name in SCRIPTS}


def test_a_target_is_met_only_by_figures_that_were_measured():
    from benchmarks.gpu_steps import Target  # a worker loads this file, but needs no networks

    target = Target(gain=2.0, utilisation=0.55)
    assert target.describe() == ">= 2x, >= 55% of peak"
    assert target.met(1.0, GIB, gain=2.1, utilisation=0.6)
    assert not target.met(1.0, GIB, gain=None, utilisation=0.6)
    assert not target.met(1.0, GIB, gain=2.1, utilisation=0.5)
    assert not Target(seconds=0.2).met(0.3, GIB, None, None)
    assert not Target(gib=1).met(0.3, 2 * GIB, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_runs_on_a_cpu(name, tmp_path):
    status = gpu.main([name, "--tiny", "--out", str(tmp_path), "--device", "cpu", "--seconds", "3600"])
    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert status == 0, text
    assert "No row is missing." in text
    assert torch.__version__ in text
