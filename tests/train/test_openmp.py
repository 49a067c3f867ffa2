"""OpenMP's threads give the CPU to others soon: scripts that compute set it before they load PyTorch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPUTE = [
    *sorted(ROOT.glob("train/train_*.py")), *sorted(ROOT.glob("inference/[a-z]*.py")),
    ROOT / "tools/cache.py", ROOT / "tools/search_batch_size.py",
]  # fmt: skip


@pytest.mark.parametrize("script", COMPUTE, ids=lambda path: path.stem)
def test_a_script_sets_how_threads_wait_before_any_other_import(script):
    first = next(node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import warpcore.openmp"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_processes_inherit_it_and_the_environment_wins(given, spins):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    program = "import warpcore.openmp, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    told = subprocess.run(
        (sys.executable, "-c", program), env=plain | given, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [str(spins), "False"]
