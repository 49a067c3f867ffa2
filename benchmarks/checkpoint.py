"""How long saving a checkpoint stops training, and what it costs beside.

    python3 benchmarks/checkpoint.py [--millions 1 10 50]

A stack of matrices is trained with AdamW and an average of the weights, so that a checkpoint holds 16 bytes for each
parameter, and 8 more go into the two exported files. The pause is what the training loop waits for: gathering the
weights for those files, and a copy of everything else; hashing and writing go on beside training, which they slow down
on a machine without cores to spare. Both are given as a share of the time between two saves of the default save_every.
"""

import argparse
import io
import json
import multiprocessing
import os
import socket
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from warpcore.config import Config, make_config
from warpcore.core import Losses, WarpCore

SAVE_EVERY = Config.model_fields["save_every"].default
WIDTH = 1024
TOKENS = 64
"""Rows that go through every matrix, per sample."""
UPDATES_PER_SAVE, SAVES = 6, 5
MOST_SHARE = 0.02
"""What saving may take of the time between two saves."""


class StackConfig(Config):
    millions: int = 1
    """Parameters."""
    report: str
    """File for the measured times."""


class Stack(WarpCore):
    Config = StackConfig
    bucket_factor = 8

    def build(self):
        torch.manual_seed(0)
        blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(self.config.millions)]
        self.pauses: list[float] = []
        self.updates_alone: list[float] = []
        self.updates_beside_a_save: list[float] = []
        return {"generator": nn.Sequential(*blocks)}

    def loss(self, batch, random):
        x = random.normal("rows", TOKENS, WIDTH)
        y = self.networks["generator"](x)
        error = (y - x).square().mean(dim=(1, 2))
        return Losses(error, error)

    def make_update(self, batches):
        began = time.perf_counter()
        super().make_update(batches)
        pending = self.checkpoints._pending
        kind = self.updates_alone if pending is None or pending.done() else self.updates_beside_a_save
        kind.append(time.perf_counter() - began)

    def _save(self):
        self.checkpoints.wait()  # with UPDATES_PER_SAVE so few, the save before may not be over
        began = time.perf_counter()
        super()._save()
        self.pauses.append(time.perf_counter() - began)

    def close(self):
        if self.processes.is_main:
            times = {"pause": self.pauses, "alone": self.updates_alone, "beside": self.updates_beside_a_save}
            Path(self.config.report).write_text(json.dumps(times), encoding="utf-8")
        super().close()


def measure(folder: Path, millions: int, count: int) -> dict:
    """Times in seconds and sizes in MB of a run on `count` processes."""
    settings = {
        "experiment_id": f"{millions}x{count}", "checkpoint_path": str(folder), "webdataset_path": str(_data(folder)),
        "updates": UPDATES_PER_SAVE * SAVES, "save_every": UPDATES_PER_SAVE, "batch_size": 4, "image_size": 16,
        "num_workers": 0, "device": "cpu", "ema_start_iters": 0, "use_fsdp": True, "millions": millions,
        "report": str(folder / f"{millions}x{count}.json"),
    }  # fmt: skip
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(rank, count, port, settings)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    times = json.loads(Path(settings["report"]).read_text(encoding="utf-8"))
    state = max((folder / settings["experiment_id"] / "state").iterdir())
    update = statistics.median(times["alone"][2:])
    beside = statistics.median(times["beside"]) if times["beside"] else update
    pause = statistics.median(times["pause"][1:])
    slowed = sum(seconds - update for seconds in times["beside"]) / SAVES
    return {
        "state_mb": sum(path.stat().st_size for path in state.iterdir()) / 1e6,
        "update": update, "beside": beside, "pause": pause, "share": pause / (update * SAVE_EVERY),
        "share_with_slowdown": (pause + slowed) / (update * SAVE_EVERY),
    }  # fmt: skip


def _run(rank: int, count: int, port: int, settings: dict) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    raise SystemExit(Stack(make_config(StackConfig, settings)).run())


def _data(folder: Path) -> Path:
    path = folder / "a.tar"
    if not path.exists():
        content = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(content, "PNG")
        with tarfile.open(path, "w") as tar:
            for number in range(16):
                for extension, data in (("png", content.getvalue()), ("txt", b"black")):
                    entry = tarfile.TarInfo(f"{number:02d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    print(
        "| parameters | processes | checkpoint MB | update s | pause s | update beside a save s | "
        f"pause of {SAVE_EVERY} updates | with slower updates | under {MOST_SHARE:.0%} |\n|{'---|' * 9}"
    )
    for millions in given.millions:
        for count in given.processes:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(Path(folder), millions, count)
            print(
                f"| {millions} M | {count} | {found['state_mb']:.0f} | {found['update']:.3f} | {found['pause']:.3f} | "
                f"{found['beside']:.3f} | {found['share']:.3%} | {found['share_with_slowdown']:.3%} | "
                f"{'yes' if found['share'] < MOST_SHARE else 'NO'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
