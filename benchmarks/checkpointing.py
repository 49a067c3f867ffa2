"""What each level of `activation_checkpointing` saves of a family's memory, and what it costs in time.

    python3 benchmarks/checkpointing.py                         # NOVA, whose levels are parts of the network
    python3 benchmarks/checkpointing.py --families dit --cases tiny --turns 5

Updates of a training script from caches, with random weights: on a GPU of the published sizes, else of small ones
(`benchmarks/plain_loops.py`). The levels take turns on one network. Memory is the most that tensors took during an
update, weights and the optimizer included; time is the median of the turns.
"""

import warpcore.openmp
import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.family_step import cases
from benchmarks.gpu_memory import LEVELS, MIB, from_caches
from benchmarks.plain_loops import FAMILIES, Case, Family
from warpcore.rehearsal import Rehearsal, bucket_sizes


def measure(family: Family, case: Case, device: torch.device, turns: int) -> dict[int, tuple[float, int]]:
    """Seconds of an update, and bytes at its peak, of each level."""
    found: dict[int, list[tuple[float, int]]] = {level: [] for level in LEVELS}
    with tempfile.TemporaryDirectory(prefix="warpcore_checkpointing_") as folder:
        kind, config = from_caches(family, case, Path(folder), device)
        with Rehearsal(kind, config, math.inf) as rehearsal:
            size = bucket_sizes(rehearsal.run)[0]
            rehearsal.update(size, case.batch)  # warms up
            for _ in range(turns):
                for level in LEVELS:
                    rehearsal.run.networks["generator"].set_activation_checkpointing(level)
                    found[level].append(rehearsal.measure(size, case.batch))
    return {level: (statistics.median(s for s, _ in took), max(b for _, b in took)) for level, took in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["nova"])
    parser.add_argument("--cases", default="", help="only cases whose names contain this text")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {options.turns} turns\n"
    )
    print("| case | level | MiB at the peak | saved | ms per update | beside level 0 |\n|---|---|---|---|---|---|")
    for family in map(FAMILIES.get, options.families):
        for case in cases(device, family):
            if options.cases in str(case):
                found = measure(family, case, device, options.turns)
                (fastest, most), *_ = found.values()
                for level, (seconds, peak) in found.items():
                    saved, ratio = f"{1 - peak / most:.0%}", f"{seconds / fastest:.2f}x"
                    print(
                        f"| {case} | {level} | {peak / MIB:.1f} | {saved} | {seconds * 1000:.1f} | {ratio} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
