"""Survival: a run whose processes are killed at random moments, and a run on damaged data. Is anything lost?

    python3 benchmarks/chaos.py [--kills 30] [--updates 200] [--seed 0]

Elastic: the same run on 1, 2 and 4 processes; how far the losses come apart, the further it goes. Kills: SIGKILL of a
random process at a random moment (one in eight while the run still starts), then the run is started again on 1, 2 or 4
processes, as chance has it. At the end `metrics.jsonl` and the weights are compared with those of a run that nothing
disturbed. Damage: one sample in a hundred is damaged, in the ways of `DAMAGE`; the same run on 1, 2 and 4 processes
has to go on and to tell the same of it. What else may happen to a run: faults.py, survival.py.

All on a tiny network, on the CPU over gloo; tests/warpcore/test_chaos.py runs it too.
"""

import argparse
import io
import json
import random
import re
import shutil
import struct
import tarfile
import tempfile
import time
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from benchmarks.disturbed_runs import (
    COUNTS,
    FIRST_UPDATES,
    TIMEOUT_SECONDS,
    Difference,
    disturb,
    folder_of,
    preload,
    train,
)
from warpcore.core import Losses, WarpCore

UPDATES_PER_KILL = 10
LOSS_EDGES = (FIRST_UPDATES, 50, 100, 200, 500, 1000)

# --- the run


class Denoiser(WarpCore):
    """Noise, dropout, an average, and state that is not a gradient: what a resumed run could get wrong."""

    bucket_factor = 8

    def build(self):
        self.mean_loss = self.bookkeeping["mean_loss"] = nn.BatchNorm1d(1, affine=False)
        layers = (nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 1))
        return {"generator": nn.Sequential(*layers)}

    def loss(self, batch, random):
        clean = batch.images.float() / 127.5 - 1
        noised = clean + random.normal("noise", *clean.shape[1:]) * random.uniform("strength")[:, None, None, None]
        raw = (self.networks["generator"](noised) - clean).square().mean(dim=(1, 2, 3))
        return Losses(raw / (1 + self.mean_loss.running_mean), raw, {"raw": raw})

    def update_state(self, statistics):
        self.mean_loss.running_mean.lerp_(statistics["raw"].mean(), 0.1)


def settings_of(folder: Path, data: Path, **changes) -> dict:
    """The configuration of a run in `folder`."""
    return {
        "experiment_id": "run", "checkpoint_path": str(folder), "webdataset_path": str(data), "device": "cpu",
        "batch_size": 8, "micro_batch_size": 2, "image_size": 16, "multi_aspect_ratio": [1.0, 1.5], "lanes": 2,
        "captions_getter": ["json", "lambda j: j['caption']"], "num_workers": 0, "lr": 0.003, "ema_start_iters": 2,
        "ema_beta": 0.9, "save_every": 4, "log_every": 1, "process_timeout_seconds": TIMEOUT_SECONDS,
    } | changes  # fmt: skip


# --- the same run on more processes


def compare_counts(folder: Path, updates: int) -> dict[int, dict[str, float]]:
    """For 2 processes or more: the largest relative difference of a loss to the run on one, by range of updates.

    Raises:
        RuntimeError: they did not see the same samples.
    """
    data = write_data(folder / "data", num_samples=120)
    runs = {count: train(settings_of(folder / str(count), data, updates=updates), count) for count in COUNTS}
    alone, edges = runs.pop(1), [0, *(edge for edge in LOSS_EDGES if edge < updates), updates]
    found = {}
    for count, lines in runs.items():
        if [line["samples_hash"] for line in lines] != [line["samples_hash"] for line in alone]:
            raise RuntimeError(f"{count} processes saw other samples than one")
        apart = [abs(line["loss"] / same["loss"] - 1) for line, same in zip(lines, alone, strict=True)]
        found[count] = {f"{a + 1}-{b}": max(apart[a:b]) for a, b in pairwise(edges)}
    return found


# --- kills


def kill_again_and_again(folder: Path, kills: int, seed: int) -> Difference:
    """Train to the end in spite of `kills` kills, and compare with an undisturbed run on one process.

    `seed` decides who is killed when and how many processes start; the moments themselves are as exact as a clock is.
    """
    data = write_data(folder / "data", num_samples=120)
    updates = UPDATES_PER_KILL * kills
    whole, killed = (settings_of(folder / name, data, updates=updates) for name in ("whole", "killed"))
    train(whole, 1)
    disturb(killed, COUNTS, random.Random(seed), kills)
    return Difference.between(killed, whole)


# --- damage


def _picture(number: int, kind: str) -> bytes:
    size = ((16, 16), (16, 24), (24, 16))[number % 3]
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def _bomb() -> bytes:
    """A PNG of a few bytes that says it has 10 thousand million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


DAMAGE = {
    "cut JPEG": {"jpg": _picture(1, "JPEG")[:-200]},
    "cut PNG": {"png": _picture(1, "PNG")[:-200]},
    "bad JSON": {"json": b'{"caption": "a pic'},
    "no caption in the JSON": {"json": b"{}"},
    "empty caption": {"json": b'{"caption": ""}'},
    "wrong extension": {"jpg": _picture(1, "PNG")},
    "bomb": {"png": _bomb()},
    "no picture at all": {"jpg": b"<html>404</html>"},
    "zero bytes": {"jpg": b""},
}
"""What of a sample is replaced by what. Two of these can still be trained on: no caption is a caption, and what a file
holds counts more than its name."""


def cut_tars(folder: Path, first: int) -> None:
    """Add two tars, numbered from `first`, that end too early: at the header of a sample, and within a member."""
    for number in range(2):
        (whole,) = write_data(folder / "whole", 100, first=first + 100 * number).glob("*.tar")
        with tarfile.open(whole) as tar:
            picture, text = tar.getmembers()[80:82]
        length = (picture.offset, text.offset_data + 5)[number]
        (folder / whole.name).write_bytes(whole.read_bytes()[:length])
        shutil.rmtree(whole.parent)


def write_data(folder: Path, num_samples: int, damage_every: int | None = None, first: int = 0) -> Path:
    """Tars of 100 samples; of every `damage_every` samples one is damaged, in all ways by turns."""
    folder.mkdir(parents=True)
    for start in range(first, first + num_samples, 100):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for number in range(start, min(start + 100, first + num_samples)):
                members = {"jpg": _picture(number, "JPEG"), "json": b'{"caption": "picture %d"}' % number}
                name = f"{number:06d}"
                if damage_every and number % damage_every == damage_every // 2:
                    kind = list(DAMAGE)[number // damage_every % len(DAMAGE)]
                    members |= DAMAGE[kind]
                    name += f" {kind}"
                    if "png" in DAMAGE[kind]:
                        del members["jpg"]
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{name}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


@dataclass(frozen=True)
class Told:
    """What a run said of its data."""

    rows: str
    """At its start: how many rows can be drawn, and why others can't."""
    bad_samples: tuple[tuple[str, str], ...]
    """(source, reason) of each, sorted."""
    count: int
    """In info.json."""
    hashes: tuple[str, ...]
    """The samples of each update."""


def train_on_damaged_data(folder: Path, count: int) -> Told:
    """One epoch and a little more over damaged data, on `count` processes."""
    data = folder / "data"
    if not data.exists():
        write_data(data, num_samples=100 * len(DAMAGE), damage_every=100)
        cut_tars(data, first=100 * len(DAMAGE))
    settings = settings_of(
        folder / str(count), data, batch_size=32, micro_batch_size=8, updates=4 * len(DAMAGE), max_bad_samples=8
    )
    lines = train(settings, count)
    log = (folder_of(settings).parent / "log.txt").read_text(encoding="utf-8")
    return Told(
        re.search(r"training data: (.*)", log)[1].strip(),
        tuple(sorted(re.findall(r"bad sample \S*/(\d+\.tar/.*?): (.*?)\s*$", log, re.MULTILINE))),
        json.loads((folder_of(settings) / "info.json").read_text(encoding="utf-8"))["bad_samples"],
        tuple(line["samples_hash"] for line in lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--updates", type=int, default=200, help="of the runs on 1, 2 and 4 processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    preload("warpcore.core")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart = compare_counts(folder / "elastic", given.updates)
        print("Losses beside those of one process, largest relative difference (the samples are the same):\n")
        print(f"| processes | {' | '.join(f'updates {each}' for each in apart[2])} |\n|{'---|' * (1 + len(apart[2]))}")
        for count, found in apart.items():
            print(f"| {count} | {' | '.join(f'{value:.1e}' for value in found.values())} |", flush=True)
        began = time.monotonic()
        found = kill_again_and_again(folder / "kills", given.kills, given.seed)
        seconds = time.monotonic() - began
        print(
            f"\n{given.kills} kills over {given.kills * UPDATES_PER_KILL} updates in {seconds:.0f} s: "
            f"{found.wrong_samples} updates with other samples; largest differences: loss {found.early_loss:.1e} in "
            f"the first {FIRST_UPDATES} updates, {found.late_loss:.1e} later; weights {found.weights:.1e}",
            flush=True,
        )
        told = {count: train_on_damaged_data(folder / "damage", count) for count in COUNTS}
        first = told[COUNTS[0]]
        print(f"\nDamaged data: {first.rows}\n{first.count} bad samples while training:")
        print("\n".join(f"  {source}: {reason}" for source, reason in first.bad_samples))
        equal = all(one == first for one in told.values())
        print(f"the same on {', '.join(map(str, COUNTS))} processes: {'yes' if equal else 'NO'}\n", flush=True)


if __name__ == "__main__":
    main()
