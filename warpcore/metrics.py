"""`metrics.jsonl`: a line per update, kept on the device until a flush so that training never waits for a number."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from warpcore.files import open_to_read, writing
from warpcore.processes import Processes
from warpcore.safe_json import parse_json
from warpcore.text import read_text

MAX_LINE_BYTES = 2**20


class Metrics:
    """Collects the numbers of each update and writes them, reduced over all processes, when asked to.

    Tensors are averaged over the processes, `samples_hash` is added up modulo 2**64, and plain numbers are those of
    the main process.

    Args:
        batch_size: samples of an update; None where each says its `samples`.
    """

    def __init__(self, path: Path, processes: Processes, batch_size: int | None):
        self.path = path
        self.processes = processes
        self.batch_size = batch_size
        self.samples_seen = 0
        """Of all updates that were flushed."""
        self._interval_started = time.monotonic()
        self._lines: list[dict] = []

    def resume(self, update: int, samples_seen: int | None = None) -> None:
        """Forget every line after `update`: those updates will be repeated.

        samples_seen: up to there; None: as many as with the present batch size.
        """
        self.samples_seen = update * (self.batch_size or 0) if samples_seen is None else samples_seen
        if not self.processes.is_main or not self.path.exists():
            return
        kept = [line for line in read_text(self.path).splitlines() if _update_of(line) <= update]
        partial = self.path.with_suffix(".partial")
        with writing(partial, "w") as file:
            file.writelines(line + "\n" for line in kept)
        os.replace(partial, self.path)

    def add(self, update: int, samples_hash: int = 0, **values: float | torch.Tensor) -> None:
        """Numbers of one update; a second call for the same update adds to its line."""
        if not self._lines or self._lines[-1]["update"] != update:
            self._lines.append({"update": update, "samples_hash": 0})
        line = self._lines[-1]
        line["samples_hash"] = (line["samples_hash"] + samples_hash) % 2**64
        line.update(values)

    def forget(self, update: int) -> None:
        """Drop what was added for updates after `update`, which were taken back."""
        self._lines = [line for line in self._lines if line["update"] <= update]

    def extend(self, update: int, values: dict[str, float]) -> None:
        """Add plain numbers to the line of `update`, the last one that was written."""
        if not (self.processes.is_main and values):
            return
        last = self.last_line()
        with writing(self.path, "r+" if self.path.exists() else "w") as file:
            end = file.seek(0, os.SEEK_END)
            if last.get("update") == update:
                file.seek(end - len("}\n"))
                file.write(", " + json.dumps(_finite(values))[1:] + "\n")  # in one piece: whole, or cut off on resume
            else:
                file.write(json.dumps({"update": update} | _finite(values)) + "\n")

    def last_line(self) -> dict:
        """The last line that was written, empty where there is none."""
        if not self.path.exists():
            return {}
        with open_to_read(self.path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LINE_BYTES))
            lines = file.read().splitlines()
        return _as_object(lines[-1]) if lines else {}

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        started = time.monotonic()
        yield
        self._interval_started += time.monotonic() - started

    def flush(self) -> list[dict]:
        """Fetch, reduce and write the collected lines; returns them as plain numbers (on every process).

        Each gets the speed of the whole interval: on a GPU, only here is it known that the work is done.
        """
        lines, self._lines = self._lines, []
        names = [(i, name) for i, line in enumerate(lines) for name, v in line.items() if isinstance(v, torch.Tensor)]
        if names:
            values = torch.stack([lines[i][name].detach().float().reshape(()) for i, name in names]).cpu().double()
            for (i, name), value in zip(
                names, (self.processes.sum(values) / self.processes.count).tolist(), strict=True
            ):
                lines[i][name] = value
        now = time.monotonic()
        if lines:
            before = self.samples_seen
            for line in lines:
                self.samples_seen += round(line["samples"]) if self.batch_size is None else self.batch_size
                line["samples_seen"] = self.samples_seen
            speed = (self.samples_seen - before) / (now - self._interval_started)
            for line in lines:
                line["samples_per_second"] = speed
            # int64 wraps around exactly like addition modulo 2**64.
            hashes = self.processes.sum(torch.tensor([_signed(line["samples_hash"]) for line in lines]))
            for line, value in zip(lines, hashes.tolist(), strict=True):
                line["samples_hash"] = f"{value % 2**64:016x}"
        self._interval_started = now
        if self.processes.is_main and lines:
            with writing(self.path, "a") as file:
                file.writelines(json.dumps(_finite(line)) + "\n" for line in lines)
        return lines


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _update_of(line: str) -> float:
    """The update of a line; a line cut short by a crash belongs to no update."""
    update = _as_object(line).get("update")
    return update if isinstance(update, int) else math.inf


def _as_object(line: str | bytes) -> dict:
    """What a line says; nothing where a crash cut it short, or it is no line of ours."""
    try:
        found = parse_json(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _finite(line: dict) -> dict:
    """JSON has no NaN: such a number is written as null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
