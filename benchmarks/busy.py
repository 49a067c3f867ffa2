"""What an update takes on a quiet machine and beside other work, by how long OpenMP's threads spin.

    python3 benchmarks/busy.py                     # on a machine that does nothing else
    python3 benchmarks/busy.py --spins 0 1000 300000 --busy 2

What a run uses is in `warpcore.openmp`. Each setting has a process of its own, which trains a small Stage C; the
processes take turns, first on the quiet machine, then beside processes that only count. The first line of the table is
PyTorch's own setting.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

DEFAULT_SPINS = 300_000
"""Of GNU OpenMP, if it is not told otherwise."""
MEASURE = """
import sys, time
import torch
from modules.stage_c import StageC
torch.manual_seed(0)
width = {"c_clip_text": 64, "c_clip_text_pooled": 64, "c_clip_img": 64}
network = StageC(c_cond=128, c_hidden=[128, 128], nhead=[4, 4], blocks=[[1, 2], [2, 1]], **width).train()
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
x, texts = torch.randn(4, 16, 6, 6), {"clip_text": 16, "clip_text_pooled": 1, "clip_img": 1}
given = {"x": x, "r": torch.rand(4)} | {name: torch.randn(4, count, 64) for name, count in texts.items()}
def update():
    network(**given).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
update()
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range(int(line)):
        update()
    print((time.perf_counter() - began) / int(line), flush=True)
"""


class Trainer:
    """A process that trains with OpenMP's threads spinning `spins` times."""

    def __init__(self, spins: int, threads: int):
        environment = os.environ | {"GOMP_SPINCOUNT": str(spins), "OMP_NUM_THREADS": str(threads)}
        environment.pop("OMP_WAIT_POLICY", None)
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self.process = subprocess.Popen(
            [sys.executable, "-c", MEASURE],
            env=environment,
            text=True,
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def turn(self, updates: int, beside_work: bool) -> None:
        print(updates, file=self.process.stdin, flush=True)
        self.seconds[beside_work].append(float(self.process.stdout.readline()))


def measure(spins: Sequence[int], rounds: int, updates: int, busy: int, threads: int) -> dict[int, dict[bool, float]]:
    """Median seconds per update by spins, then by whether other work goes on."""
    trainers = {count: Trainer(count, threads) for count in spins}
    work: list[subprocess.Popen] = []
    try:
        for trainer in trainers.values():
            trainer.turn(1, beside_work=False)  # until it has started
            trainer.seconds[False].clear()
        for beside_work in (False, True):
            if beside_work:
                work = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                time.sleep(1)
            for _ in range(rounds):
                for trainer in trainers.values():
                    trainer.turn(updates, beside_work)
    finally:
        for process in (*work, *(trainer.process for trainer in trainers.values())):
            process.kill()
            process.wait()
    return {
        count: {beside: statistics.median(seconds) for beside, seconds in trainer.seconds.items()}
        for count, trainer in trainers.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=5, help="of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="processes of the other work")
    options = parser.parse_args(arguments)
    spins = list(dict.fromkeys([DEFAULT_SPINS, *options.spins]))
    found = measure(spins, options.rounds, options.updates, options.busy, options.threads)
    first = found[DEFAULT_SPINS]
    print(f"{options.threads} threads; other work: {options.busy} processes\n")
    print("| spins | quiet, ms | by the default | beside work, ms | by the default | by quiet |")
    print("|---|---|---|---|---|---|")
    for count, seconds in found.items():
        quiet, beside = seconds[False], seconds[True]
        print(
            f"| {count:,} | {1000 * quiet:.1f} | {quiet / first[False]:.2f} | {1000 * beside:.1f} "
            f"| {beside / first[True]:.2f} | {beside / quiet:.1f} |"
        )


if __name__ == "__main__":
    main()
