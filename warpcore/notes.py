"""`notes.jsonl`: what a run tells people, a line each, and how its starts begin and end.

Each line has `update`, `time` (seconds since 1970) and `text`. Some have `state`, too: "running" with the `command`
that started the run and the `folder` it was given in, "finished", "stopped" or "failed". A start without such an end
was killed.
"""

import json
import os
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from warpcore.errors import UserError
from warpcore.files import writing
from warpcore.redaction import redact

NOTES = "notes.jsonl"


class Notes:
    """Of one start of a run; of processes other than the main one, and with `path` None, none are kept."""

    def __init__(self, path: Path | None = None):
        self.path = path

    def begin(self, update: int) -> None:
        command, folder = start_command(), {}
        with suppress(OSError):  # of a folder that was removed
            folder["folder"] = os.getcwd()
        self.add(update, f"start: {command}", state="running", command=redact(command), **folder)

    def add(self, update: int, text: str, **more: str) -> None:
        if self.path is not None:
            line = {"update": update, "time": round(time.time(), 3), "text": redact(text)} | more
            with writing(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def end(self, update: int, updates: int) -> None:
        if update < updates:
            self.add(update, "stopped by a signal, and saved", state="stopped")
        else:
            self.add(update, "the last update is made", state="finished")

    def fail(self, update: int, error: BaseException) -> None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # of a full disk; the run's own error is told in any case
            self.add(update, text, state="failed")


def start_command() -> str:
    """The command that started this process, as a shell takes it: that of torchrun or srun where they did."""
    command = list(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = _count("LOCAL_WORLD_SIZE")
        machines = max(_count("WORLD_SIZE") // here, 1)
        several = ["--nnodes", str(machines)] if machines > 1 else []
        command = ["torchrun", *several, "--nproc-per-node", str(here), *sys.argv]
    elif (tasks := _count("SLURM_STEP_NUM_TASKS")) > 1:
        command = ["srun", f"--nodes={_count('SLURM_STEP_NUM_NODES')}", f"--ntasks={tasks}", *command]
    return shlex.join(command)


def _count(variable: str) -> int:
    """A number of processes or machines as a launcher says it; 1 where it says nothing."""
    said = os.environ.get(variable, "")
    return max(int(said), 1) if re.fullmatch("[0-9]{1,9}", said) else 1
