"""Runs in processes of their own that are killed, or whose disk is full, and how far they are from one that is not."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import torch
from safetensors.torch import load_file

from warpcore.config import Config, make_config

COUNTS = (1, 2, 4)
"""Numbers of processes; each divides the micro-batches of an update."""
TIMEOUT_SECONDS = 15.0
"""How long a process waits for one that was killed before they met."""
MARGIN_SECONDS = 60.0
"""What starting and ending may take besides, on a busy machine."""
KILLS_PER_EARLY_ONE = 8
"""One kill in this number hits a run that has not begun to train."""
FIRST_UPDATES = 20
TOLD_OF_FULL_DISK = ("full disk", "File too large")
"""A run says one of these: the second, of this limit, where it begins with files of S3."""
FULL_DISK_BYTES = 2**18
"""No file can grow beyond that where the disk is full: less than the weights of a mini, more than a log."""
DENOISER = "benchmarks.chaos:Denoiser"
"""A tiny use case."""

# Processes are forked from a server; `preload` lets it import the slow things once.
_CONTEXT = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Have modules imported before processes are forked."""
    _CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", *modules])


class Started:
    """One start of a run on `count` processes, as a launcher makes it. What they print goes to `log.txt`.

    Args:
        environment: variables of the processes; they have those of the server that they are forked from otherwise.
        case: the use case, as MODULE:CLASS.
        disk_is_full: no file can grow beyond FULL_DISK_BYTES.
    """

    def __init__(
        self, settings: dict, count: int, environment: Mapping[str, str] | None = None, case: str = DENOISER,
        disk_is_full: bool = False,
    ):  # fmt: skip
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.log = folder_of(settings).parent / "log.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if disk_is_full:
            self.log.unlink(missing_ok=True)  # or it might be what is too large
        arguments = (count, port, settings, self.log, environment or {}, case, disk_is_full)
        self._began = self.log.stat().st_size if self.log.exists() else 0
        self.processes = [_CONTEXT.Process(target=_run, args=(rank, *arguments)) for rank in range(count)]
        for process in self.processes:
            process.start()

    @property
    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    @property
    def told(self) -> str:
        """All that they printed: what the first one of them met may stand far above what the others say of it."""
        return self.log.read_bytes()[self._began :].decode(errors="replace")

    def send(self, rank: int, number: signal.Signals) -> None:
        """Nothing is sent to a process that has ended: `finish` tells how."""
        if self.processes[rank].exitcode is None:
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
            raise TimeoutError(
                f"process {codes.index(None)} of {len(codes)} still ran after {seconds:.0f} s:\n{self.told}"
            )
        return codes


def _run(
    rank: int, count: int, port: int, settings: dict, log: Path, environment: Mapping[str, str], case: str,
    disk_is_full: bool,
) -> None:  # fmt: skip
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    if disk_is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    os.environ |= environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    kind = resolve_name(case)
    raise SystemExit(kind(make_config(kind.Config, settings)).run())


def train(
    settings: dict, count: int, environment: Mapping[str, str] | None = None, case: str = DENOISER,
    seconds: float | None = None,
) -> list[dict]:  # fmt: skip
    """Train to the end; returns the lines of metrics.jsonl. seconds: how long it may take, by default 1 an update."""
    started = Started(settings, count, environment, case)
    codes = started.finish(MARGIN_SECONDS + settings["updates"] if seconds is None else seconds)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n{started.told}")
    return read_metrics(settings)


def read_metrics(settings: dict) -> list[dict]:
    """The lines so far; one that is being written is left out."""
    path = folder_of(settings) / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def folder_of(settings: dict) -> Path:
    """Where the run writes on this machine, whether or not that is sent to S3."""
    place, scratch = settings["checkpoint_path"], settings.get("scratch_path")
    return Config.model_construct(
        experiment_id=settings["experiment_id"],
        checkpoint_path=place if place.startswith("s3://") else Path(place),
        scratch_path=scratch and Path(scratch),
    ).run_folder


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
            raise RuntimeError(f"{folder_of(settings)} has other updates than {folder_of(other)}")
        losses = [abs(line["loss"] - same["loss"]) for line, same in zip(lines, others, strict=True)]
        files = sorted(path.name for path in folder_of(other).glob("*.safetensors"))
        weights = [
            (ours[key] - tensor).abs().max().item()
            for name in files
            for ours in (load_file(folder_of(settings) / name),)
            for key, tensor in load_file(folder_of(other) / name).items()
        ]
        return cls(
            sum(line["samples_hash"] != same["samples_hash"] for line, same in zip(lines, others, strict=True)),
            max(losses[:FIRST_UPDATES]), max(losses[FIRST_UPDATES:], default=0.0), max(weights),
        )  # fmt: skip


def disturb(
    settings: dict,
    counts: Sequence[int],
    chance: random.Random,
    kills: int,
    full_disks: int = 0,
    *,
    case: str = DENOISER,
    environment: Mapping[str, str] | None = None,
    patience: float = TIMEOUT_SECONDS + MARGIN_SECONDS,
) -> None:
    """Train to the end in spite of `kills` kills and starts on a full disk, each on one of `counts` processes.

    Args:
        chance: decides when what happens.
        environment: of the processes. Of a run on S3 they are starts of one Slurm job: no lease stands in their way.
        patience: seconds that the others may take to end after a kill, and a run to meet its full disk.

    Raises:
        RuntimeError, TimeoutError: a run ended otherwise than it should, or not at all.
    """
    troubles = ["kill"] * kills + ["full disk"] * full_disks
    chance.shuffle(troubles)
    updates = settings["updates"]
    moments = sorted(chance.randrange(updates) for _ in troubles)
    for number, (trouble, update) in enumerate(zip(troubles, moments, strict=True)):
        own = _environment(settings, environment or {}, number)
        began_at = _last_update(settings)
        started = Started(settings, chance.choice(counts), own, case, disk_is_full=trouble == "full disk")
        if trouble == "full disk":
            codes = started.finish(patience)
            if began_at < updates and not (any(codes) and any(words in started.told for words in TOLD_OF_FULL_DISK)):
                raise RuntimeError(f"exit codes {codes} with a full disk:\n{started.told}")
        else:
            early = number % KILLS_PER_EARLY_ONE == KILLS_PER_EARLY_ONE // 2
            _kill(started, settings, None if early else update, chance, patience)
        print(
            f"{trouble} {number + 1} of {len(troubles)}, on {len(started.processes)} processes, update {began_at} to "
            f"{_last_update(settings)}",
            file=sys.stderr,
            flush=True,
        )
    own = _environment(settings, environment or {}, len(troubles))
    train(settings, chance.choice(counts), own, case, patience + max(1.0, patience / 10) * updates)


def _environment(settings: dict, given: Mapping[str, str], restarts: int) -> dict[str, str]:
    on_s3 = settings["checkpoint_path"].startswith("s3://")
    return dict(given) | ({"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": str(restarts)} if on_s3 else {})


def _kill(started: Started, settings: dict, update: int | None, chance: random.Random, patience: float) -> None:
    """Kill one of the processes after `update`, or, with None, soon."""
    if update is None:
        time.sleep(chance.uniform(0.0, 2.0))
    else:
        while started.running and _last_update(settings) < update:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.1))
    victim = chance.randrange(len(started.processes))
    started.send(victim, signal.SIGKILL)
    codes = started.finish(patience)
    if codes[victim] != -signal.SIGKILL and any(codes):
        raise RuntimeError(f"exit codes {codes} before the kill:\n{started.told}")


def _last_update(settings: dict) -> int:
    lines = read_metrics(settings)
    return lines[-1]["update"] if lines else 0
