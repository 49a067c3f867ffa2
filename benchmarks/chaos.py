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
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from warpcore.config import make_config
from warpcore.core import Losses, WarpCore

COUNTS = (1, 2, 4)
"""Numbers of processes; each divides the micro-batches of an update."""
UPDATES_PER_KILL = 10
KILLS_PER_EARLY_ONE = 8
"""One kill in so many hits a run that has not begun to train."""
TIMEOUT_SECONDS = 15.0
"""How long a process waits for one that was killed before they met."""
MARGIN_SECONDS = 60.0
"""What starting and ending may take besides, on a busy machine."""
FIRST_UPDATES = 20
LOSS_EDGES = (FIRST_UPDATES, 50, 100, 200, 500, 1000)

# Processes are forked from a server; `main` lets it import the slow things once.
_CONTEXT = multiprocessing.get_context("forkserver")


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


class Started:
    """One start of a run on `count` processes, as a launcher makes it. What they print goes to `log.txt`.

    Args:
        environment: variables of the processes; they have those of the server that they are forked from otherwise.
    """

    def __init__(self, settings: dict, count: int, environment: Mapping[str, str] | None = None):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.log = _folder(settings).parent / "log.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.processes = [
            _CONTEXT.Process(target=_run, args=(rank, count, port, settings, self.log, environment or {}))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    @property
    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def finish(self, seconds: float) -> list[int]:
        """The exit codes once all have ended by themselves; none is left. Raises TimeoutError for one that hangs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        if None in codes:
            told = self.log.read_text(encoding="utf-8")[-4000:]
            raise TimeoutError(f"process {codes.index(None)} of {len(codes)} still ran after {seconds:.0f} s:\n{told}")
        return codes


def _run(rank: int, count: int, port: int, settings: dict, log: Path, environment: Mapping[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    torch.set_num_threads(1)
    os.environ |= environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    raise SystemExit(Denoiser(make_config(Denoiser.Config, settings)).run())


def train(settings: dict, count: int, environment: Mapping[str, str] | None = None) -> list[dict]:
    """Train to the end; returns the lines of metrics.jsonl."""
    started = Started(settings, count, environment)
    codes = started.finish(MARGIN_SECONDS + settings["updates"])
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n{started.log.read_text(encoding='utf-8')[-4000:]}")
    return read_metrics(settings)


def read_metrics(settings: dict) -> list[dict]:
    """The lines so far; one that is being written is left out."""
    path = _folder(settings) / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def _folder(settings: dict) -> Path:
    """Where the run writes on this machine, whether or not that is sent to S3."""
    return make_config(Denoiser.Config, settings).run_folder


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


@dataclass(frozen=True)
class Difference:
    """Between two runs that should be the same."""

    wrong_samples: int
    """Updates that did not see the samples of the other run."""
    early_loss: float
    """The largest difference of a loss within the first updates."""
    late_loss: float
    """The same after them."""
    weights: float
    """The largest difference of a weight, or of an averaged one, at the end."""

    @classmethod
    def between(cls, settings: dict, other: dict) -> "Difference":
        lines, others = read_metrics(settings), read_metrics(other)
        if [line["update"] for line in lines] != [line["update"] for line in others]:
            raise RuntimeError(f"{_folder(settings)} has other updates than {_folder(other)}")
        losses = [abs(line["loss"] - same["loss"]) for line, same in zip(lines, others, strict=True)]
        weights = [
            (load_file(_folder(settings) / name)[key] - tensor).abs().max().item()
            for name in ("generator.safetensors", "generator_ema.safetensors")
            for key, tensor in load_file(_folder(other) / name).items()
        ]
        return cls(
            sum(line["samples_hash"] != same["samples_hash"] for line, same in zip(lines, others, strict=True)),
            max(losses[:FIRST_UPDATES]), max(losses[FIRST_UPDATES:], default=0.0), max(weights),
        )  # fmt: skip


def kill_again_and_again(folder: Path, kills: int, seed: int) -> Difference:
    """Train to the end in spite of `kills` kills, and compare with an undisturbed run on one process.

    `seed` decides who is killed when and how many processes start; the moments themselves are as exact as a clock is.
    """
    chance = random.Random(seed)
    data = write_data(folder / "data", num_samples=120)
    updates = UPDATES_PER_KILL * kills
    whole, killed = (settings_of(folder / name, data, updates=updates) for name in ("whole", "killed"))
    train(whole, 1)
    for number, update in enumerate(sorted(chance.randrange(updates) for _ in range(kills))):
        started = Started(killed, chance.choice(COUNTS))
        if number % KILLS_PER_EARLY_ONE == KILLS_PER_EARLY_ONE // 2:
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            while started.running and _last_update(killed) < update:
                time.sleep(0.02)
            time.sleep(chance.uniform(0.0, 0.1))
        victim = chance.randrange(len(started.processes))
        started.send(victim, signal.SIGKILL)
        print(f"kill {number + 1} of {kills}, at update {_last_update(killed)}", file=sys.stderr, flush=True)
        codes = started.finish(TIMEOUT_SECONDS + MARGIN_SECONDS)
        if codes[victim] != -signal.SIGKILL and any(codes):
            raise RuntimeError(
                f"exit codes {codes} before the kill:\n{started.log.read_text(encoding='utf-8')[-4000:]}"
            )
    train(killed, chance.choice(COUNTS))
    return Difference.between(killed, whole)


def _last_update(settings: dict) -> int:
    lines = read_metrics(settings)
    return lines[-1]["update"] if lines else 0


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
    log = (_folder(settings).parent / "log.txt").read_text(encoding="utf-8")
    return Told(
        re.search(r"training data: (.*)", log)[1].strip(),
        tuple(sorted(re.findall(r"bad sample \S*/(\d+\.tar/.*?): (.*?)\s*$", log, re.MULTILINE))),
        json.loads((_folder(settings) / "info.json").read_text(encoding="utf-8"))["bad_samples"],
        tuple(line["samples_hash"] for line in lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--updates", type=int, default=200, help="of the runs on 1, 2 and 4 processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "warpcore.core"])
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
