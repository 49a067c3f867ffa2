"""A part of `benchmarks/gpu.py`: rows that are measured one after the other, and the table they leave.

The rows of a part run in a process of their own (the worker), which sends each result to the process that writes the
table (`run_part`). So a row that kills its process or leaves the GPU in an error state costs only itself: a new worker
goes on with the next row. FOLDER/PART.md is readable after every row, FOLDER/PART.log holds what the rows printed and
the traceback of every error.
"""

import contextlib
import gc
import multiprocessing
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

OK, FAIL, NOT_HERE = "ok", "FAIL", "not here"
CLOSING_SECONDS = 10
"""A worker that has no rows left gets this long to end."""


class NotHere(Exception):
    """A row needs something that this machine does not have, such as a GPU or an optional package."""


@dataclass(frozen=True)
class Bench:
    """What the rows of a part are measured with."""

    out: Path
    """Folder of the tables."""
    tiny: bool
    """Small sizes, few rows: for a CPU."""
    deadline: float
    """`time.time()` at which the part is stopped."""
    scratch: Path
    """Folder for data and runs, shared by the rows of all parts; nothing in it is a result."""
    device_name: str = "auto"

    @property
    def device(self) -> torch.device:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(found if self.device_name == "auto" else self.device_name)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def needs_cuda(self, what: str) -> None:
        if self.device.type != "cuda":
            raise NotHere(f"{what} needs a GPU")


@dataclass(frozen=True)
class Outcome:
    """What a row gave: lines of the table, each as cells by column, and why its check failed, if it did."""

    lines: list[dict[str, str]]
    failure: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    measure: Callable[[Bench], Outcome]


@dataclass(frozen=True)
class Part:
    """A table. `rows(bench)` are its rows, the most important ones first."""

    name: str
    title: str
    about: str
    """What is measured and what is checked, with tolerances, targets and formulas."""
    columns: tuple[str, ...]
    rows: Callable[[Bench], list[Row]]
    seconds: float = 500
    """Time limit: a part ends in under nine minutes."""
    row_seconds: float = 240
    """Time limit of a row; one that hangs costs no more than this."""


@dataclass
class Table:
    """The Markdown file of a part, written again after every row."""

    part: Part
    path: Path
    names: list[str]
    heading: str
    status: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, name: str, status: str, lines: list[dict[str, str]], seconds: float) -> None:
        self.status[name] = status
        note = {"status": status, "s": f"{seconds:.0f}"}
        self.lines[name] = [{**note, **line} if not i else line for i, line in enumerate(lines or [{}])]
        self.write()

    @property
    def missing(self) -> list[str]:
        return [name for name in self.names if name not in self.status]

    @property
    def failed(self) -> list[str]:
        return [name for name, status in self.status.items() if status.startswith(FAIL)]

    def write(self) -> None:
        """Replace the file, in one step: whoever is killed leaves a readable table."""
        aside = self.path.with_suffix(".partial")
        aside.write_text(self.text(), encoding="utf-8")
        os.replace(aside, self.path)

    def text(self) -> str:
        counts = f"{len(self.status)} of {len(self.names)} rows, {len(self.failed)} failed"
        missing = f"Missing rows: {'; '.join(self.missing)}." if self.missing else "No row is missing."
        columns = ("row", "status", "s", *self.part.columns)
        rows = [
            "| " + " | ".join(_cell(name if column == "row" else line.get(column, "")) for column in columns) + " |"
            for name in self.status
            for line in self.lines[name]
        ]
        head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        return "\n".join(
            [f"# {self.part.title}", "", f"{counts}. {missing}", "", self.heading, "", self.part.about.strip(), "",
             *head, *rows, ""]
        )  # fmt: skip


def _cell(text: str) -> str:
    return str(text).replace("|", "/").replace("\n", " ")


def run_part(part: Part, bench: Bench, chosen: str = "", command: str = "") -> Table:
    """Measure the rows of a part whose names contain `chosen`; its table is in `bench.out` at any moment."""
    names = [row.name for row in part.rows(bench) if chosen in row.name]
    table = Table(part, bench.out / f"{part.name}.md", names, f"{describe_machine(bench)}. Command: `{command}`.")
    table.write()
    log = bench.out / f"{part.name}.log"
    log.write_text(f"{table.heading}\n", encoding="utf-8")
    while table.missing and bench.seconds_left > 0:
        _run_worker(part, bench, table, log)
    return table


def _run_worker(part: Part, bench: Bench, table: Table, log: Path) -> None:
    """Rows in a process of their own, until they are all done, it dies, or the time is over."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_work, args=(part, bench, table.missing, there, log), daemon=False)
    worker.start()
    there.close()
    began, ended, died = time.time(), False, ""
    while table.missing and not ended and not died:
        left = min(bench.seconds_left, began + part.row_seconds - time.time())
        if not here.poll(max(0.0, left)):
            whose = "row" if bench.seconds_left > 0 else "part"
            died = f"{FAIL}: stopped after {time.time() - began:.0f} s, at the time limit of the {whose}"
            continue
        try:
            name, outcome, status, ended = here.recv()
        except EOFError:
            died = f"{FAIL}: the process of this row died, see {log.name}"
            continue
        table.add(name, status, outcome.lines, time.time() - began)
        print(f"{part.name}: {name}: {status}", flush=True)
        began = time.time()
    if died:
        name = table.missing[0]
        table.add(name, died, [], time.time() - began)
        print(f"{part.name}: {name}: {died}", flush=True)
        worker.kill()
    worker.join(CLOSING_SECONDS)
    if worker.is_alive():
        worker.kill()
        worker.join()


def _work(part: Part, bench: Bench, names: list[str], results: Connection, log: Path) -> None:
    """The worker: measures rows in order and sends (name, outcome, status, whether it ends after this row) of each."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = {row.name: row for row in part.rows(bench)}
    for name in names:
        print(f"\n==== {name}", flush=True)
        outcome, status = measured(rows[name], bench)
        broken = _gpu_error(bench)
        results.send((name, outcome, f"{FAIL}: {broken}" if broken else status, bool(broken)))
        if broken:  # CUDA stays in this state until the process ends: another one measures what is left
            return


def measured(row: Row, bench: Bench) -> tuple[Outcome, str]:
    """A row's outcome and status; an exception is a failure, and its traceback goes to the log."""
    try:
        outcome = row.measure(bench)
    except NotHere as reason:
        return Outcome([]), f"{NOT_HERE}: {reason}"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        first = str(error).strip().split("\n")[0][:200]
        return Outcome([]), f"{FAIL}: {type(error).__name__}: {first}"
    if outcome.failure:
        print(f"check failed: {outcome.failure}", flush=True)
    return outcome, f"{FAIL}: {outcome.failure}" if outcome.failure else OK


def _gpu_error(bench: Bench) -> str:
    if bench.device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        return ""
    except RuntimeError as error:
        return f"the GPU is in an error state: {str(error).splitlines()[0]}"


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on occupying the GPU."""
    multiprocessing.parent_process().join()
    os._exit(1)


def describe_machine(bench: Bench) -> str:
    device = bench.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    size = (
        " Tiny: mini networks and small pictures stand in for those named; figures say nothing about a GPU."
        if bench.tiny
        else ""
    )
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"{when}, {name}, torch {torch.__version__}, Python {platform.python_version()}.{size}".rstrip(".")


def status_of(tables: Iterable[Table]) -> int:
    """0 where every row was measured and passed its check."""
    return int(any(table.failed or table.missing for table in tables))


@contextlib.contextmanager
def no_waiting(device: torch.device):
    """Inside, what makes Python wait for the GPU is an error (on CUDA; a CPU computes at once)."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
