"""Measurements for a GPU, in parts of under nine minutes that leave their results when they are stopped.

    python3 benchmarks/gpu.py smoke --out results
    python3 benchmarks/gpu.py smoke golden steps memory data --out results     # one after the other
    python3 benchmarks/gpu.py smoke --out more_results --rows train_b          # rows whose names contain a text
    python3 benchmarks/gpu.py smoke golden steps memory data --out results --tiny   # on a CPU

smoke   every training script, two updates in every mode, compared with the CPU's float32
golden  the golden cases of the tests
steps   speed, utilisation and memory of updates at the published sizes, beside diffusers' network in the plain loop
memory  what tools/memory.py counts beside measured peaks; the cost of offloading; the largest micro-batches
data    whether the loader feeds the device; caches beside pictures; copies; the pause of a checkpoint
families  updates of the other families beside the library's network in the plain loop

A part writes OUT/PART.md, row by row, and OUT/PART.log, over those of an earlier start. The exit status is 1 if a row
failed its check or is missing. Data, runs and checkpoints (up to 80 GB in `data`) go to a temporary folder (TMPDIR).
Nothing needs a network. Beside PyTorch and what the engine needs, smoke, memory and data need open_clip, the plain
loop in steps diffusers and peft, and single rows torchao, schedulefree or bitsandbytes.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a machine that only measures has the project not installed
from benchmarks.gpu_part import Bench, Part, run_part, status_of

PARTS = ("smoke", "golden", "steps", "memory", "data", "families")


def load_part(name: str) -> Part:
    """The part of a name; only its own imports are made."""
    return importlib.import_module(f"benchmarks.gpu_{name}").PART


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and logs")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rows, for a CPU")
    parser.add_argument("--seconds", type=float, help="time limit of each part; by default the part's own")
    parser.add_argument("--rows", default="", help="only rows whose names contain this text")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python3 benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    tables = []
    with tempfile.TemporaryDirectory(prefix="warpcore_gpu_") as scratch:
        for name in given.parts:
            part = load_part(name)
            deadline = time.time() + (given.seconds or part.seconds)
            bench = Bench(given.out.absolute(), given.tiny, deadline, Path(scratch), given.device)
            table = run_part(part, bench, given.rows, command)
            print(f"{table.path}: {len(table.failed)} failed, {len(table.missing)} missing", flush=True)
            tables.append(table)
    return status_of(tables)


if __name__ == "__main__":
    raise SystemExit(main())
