"""On Windows, every script and tool says where it runs instead, before it misses a module."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for folder in ("train", "tools", "inference", "models")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
# Libraries look at the system too: they are imported before it changes. Each script runs in a copy of the process.
ON_WINDOWS = """
import multiprocessing.connection, os, runpy, sys, tempfile
import numpy, pyarrow.parquet, torch, torch.utils.data, tqdm, webdataset
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

sys.platform = "win32"
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))
for script in sys.argv[1:]:
    if not (child := os.fork()):
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
    print(script, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
@pytest.mark.integration
def test_every_script_says_which_systems_it_runs_on():
    assert len(SCRIPTS) > 20
    ran = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS, *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    lines = ran.stderr.splitlines()
    assert lines[1::2] == [f"{script} 2" for script in SCRIPTS]
    assert all(line.startswith("error: Windows lacks") for line in lines[::2])
    assert all("It runs on Linux and macOS, and on Windows inside WSL2" in line for line in lines[::2])
