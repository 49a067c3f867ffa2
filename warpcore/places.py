"""Where the checkpoints of a run lie: in a folder, or on S3 with a folder of each machine as its waiting room.

Both know whole checkpoints only. What is written is `state/<update>.partial/` in the folder; `publish` makes it the
checkpoint of that update, in one step.
"""

import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from warpcore.checkpoint_table import MAX_STATE_BYTES, MAX_TABLE_BYTES
from warpcore.data.storage import in_folder_named_tilde
from warpcore.errors import UserError
from warpcore.files import open_plain, open_to_read, refuse_links
from warpcore.locks import lock_file
from warpcore.processes import Processes
from warpcore.safe_json import load_json

MANIFEST = "manifest.json"
MOST_BYTES = {"state.json": MAX_STATE_BYTES, ".metadata": MAX_TABLE_BYTES}
"""Of the files that say what is in a checkpoint."""
LOCK = ".lock"
SNAPSHOTS = "post_hoc"
"""The folder of the snapshots of `warpcore.post_hoc_ema`: UPDATE/SIGMA_REL/NAME.safetensors."""
WRITTEN = (
    *("state", "backups", SNAPSHOTS, "samples", "metrics.jsonl", "notes.jsonl", "tensorboard", "wandb", "profile"),
)
"""What a run writes to in its folder, beside files that it replaces."""
_PLAIN_NAME = re.compile(r"[\w.-]{1,255}", re.ASCII)
"""What names of a checkpoint's files are made of; anything else might lead out of it."""
_UPDATE_NAME = re.compile(r"\d{8}")

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint could not be written or read: the message says which, why and what to do."""


class Place(Protocol):
    """What `Checkpoints` asks of a place. Unless said otherwise, on the main process alone."""

    folder: Path
    """Where files are written, and where those of a checkpoint are read once they were fetched."""
    name: str
    """For messages: where people look for the checkpoints."""
    disk: str
    """For messages: the folder, and the key that names it."""

    def take(self) -> None:
        """Become the only run that writes here. Raises CheckpointError, or another UserError."""

    def join(self, processes: Processes) -> bool:
        """On all processes, after that: whether this one is the first of those that see the same folder."""

    def updates(self) -> list[int]:
        """Of the checkpoints that are here, whole or damaged."""

    def manifest(self, update: int) -> dict[str, dict] | str:
        """The fingerprints of a checkpoint's files by name, or why there are none."""

    def difference(self, update: int, name: str, recorded: Mapping) -> str | None:
        """On any process: how a file differs from what the manifest says of it."""

    def fetch(self, update: int, files: Mapping[str, Mapping]) -> None:
        """On any process: these files, recorded so by the manifest, are in the folder. Raises CheckpointError."""

    def set_aside(self, update: int) -> str:
        """A damaged checkpoint is none any more, but is kept; returns where."""

    def clear(self, update: int) -> None:
        """On one process of each machine: make room for writing this checkpoint."""

    def bring(self, update: int, names: Sequence[str]) -> None:
        """On any process: these files of its own are written."""

    def publish(self, update: int, keep_last: int) -> None:
        """What is written becomes a checkpoint; older ones go."""

    def bring_files(self) -> None:
        """Everything else in the folder (weights, metrics, samples) has to be where people look for it."""

    def has(self, name: str) -> bool:
        """Whether such a file of the run is there, or a folder that holds some."""

    def tidy(self) -> None:
        """On one process of each machine, when none reads or writes: what only waited in the folder goes."""

    def check(self) -> None:
        """Raises UserError where another run has taken the place over."""

    def leave(self) -> None:
        """Let other runs have it."""


class LocalPlace:
    """A folder that all machines of the run share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = str(folder)
        self.disk = f"{folder} (checkpoint_path)"
        self._lock = None
        self._is_new = False

    def take(self) -> None:
        self._refuse_to_start_again()
        try:
            self._is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(*(self.folder / name for name in WRITTEN))
            self._lock = lock(self.folder, self.name)
            for leftover in self.folder.glob("state/*.partial"):
                refuse_links(leftover)
                shutil.rmtree(leftover)
        except OSError as error:
            raise CheckpointError(f"checkpoint_path: cannot write to {self.folder}: {error}") from error

    def _refuse_to_start_again(self) -> None:
        """Where an earlier version, which did not expand `~`, wrote this run to a folder of that name."""
        folder, home = self.folder.absolute(), Path.home()
        if (folder / "state").exists() or not folder.is_relative_to(home):
            return
        literal = "~" / folder.relative_to(home)
        if (literal / "state").is_dir():
            raise CheckpointError(f"checkpoint_path: {in_folder_named_tilde(str(literal), str(folder))}")

    def join(self, processes: Processes) -> bool:
        return processes.is_main

    def updates(self) -> list[int]:
        numbers = (update_of(path.name) for path in (self.folder / "state").glob("*"))
        return sorted(number for number in numbers if number is not None)

    def manifest(self, update: int) -> dict[str, dict] | str:
        return read_manifest(state_folder(self.folder, update))

    def difference(self, update: int, name: str, recorded: Mapping) -> str | None:
        path = state_folder(self.folder, update) / name
        try:
            return compare(name, fingerprint(path), recorded)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"

    def fetch(self, update: int, files: Mapping[str, Mapping]) -> None:
        """They are there already."""

    def set_aside(self, update: int) -> str:
        state = state_folder(self.folder, update)
        aside = state.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
        return str(aside)

    def clear(self, update: int) -> None:
        shutil.rmtree(partial_folder(self.folder, update), ignore_errors=True)

    def bring(self, update: int, names: Sequence[str]) -> None:
        """They are there already."""

    def publish(self, update: int, keep_last: int) -> None:
        os.rename(partial_folder(self.folder, update), state_folder(self.folder, update))
        try:
            for old in self.updates()[:-keep_last]:
                leaving = partial_folder(self.folder, old)  # half removed, it must not look like a damaged one
                os.rename(state_folder(self.folder, old), leaving)
                shutil.rmtree(leaving)
        except OSError as error:  # the new one is whole all the same
            logger.warning("%s: older checkpoints stay: %s", self.name, error)

    def bring_files(self) -> None:
        """They are there already."""

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def tidy(self) -> None:
        """Nothing here only waits."""

    def check(self) -> None:
        """The lock can't be taken from a process that lives."""

    def leave(self) -> None:
        if self._lock is None:
            return
        with suppress(OSError):  # of a run that has written nothing, no folder is left
            if self._is_new and os.listdir(self.folder) == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self._lock.close()


class AnotherRun(LocalPlace):
    """The folder of another run, of which checkpoints are read, and nothing is changed. It may be in use."""

    def take(self) -> None:
        if not self.updates():
            raise CheckpointError(
                f"load: {self.folder} has no checkpoint (state/00001000, ...): name the folder of a training run of "
                "ours, or give weights alone as the key of their network"
            )

    def set_aside(self, update: int) -> str:
        return f"still {state_folder(self.folder, update)}"


def state_folder(folder: Path, update: int) -> Path:
    return folder / "state" / f"{update:08d}"


def partial_folder(folder: Path, update: int) -> Path:
    return state_folder(folder, update).with_suffix(".partial")


def update_of(name: str) -> int | None:
    return int(name) if _UPDATE_NAME.fullmatch(name) else None


def fingerprint(path: Path) -> dict:
    """What a manifest says of a file."""
    with open_to_read(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(state: Path) -> dict[str, dict] | str:
    """The fingerprints of a checkpoint's files by name, or why there are none."""
    try:
        with open_to_read(state / MANIFEST) as file:
            files = load_json(file)["files"]
        files = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()}
        strange = [name for name in files if name in (".", "..") or not _PLAIN_NAME.fullmatch(name)]
        if strange:  # it would lead out of the checkpoint
            return f"{MANIFEST} lists {strange[0]!r}, which is not a plain file name"
        wrong = [
            n for n, file in files.items() if type(file["bytes"]) is not int or not isinstance(file["sha256"], str)
        ]
        if wrong:
            return f"{MANIFEST} says no size and hash of {wrong[0]}"
        missing = [name for name in MOST_BYTES if name not in files]
        if missing:
            return f"{MANIFEST} does not list {missing[0]}"
        large = [name for name, most in MOST_BYTES.items() if files[name]["bytes"] > most]
        return f"{MANIFEST} lists a {large[0]} of more than {MOST_BYTES[large[0]] >> 20} MiB" if large else files
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"


def compare(name: str, found: Mapping, recorded: Mapping) -> str | None:
    """How what was found of a file differs from what the manifest recorded of it."""
    if found["bytes"] != recorded["bytes"]:
        return f"{name} has {found['bytes']} bytes instead of {recorded['bytes']}"
    return None if found == recorded else f"{name} is not what was written: its hash is another"


def lock(folder: Path, name: str):
    """Keep other processes of this machine (and, where the file system can, others) from writing to the folder.

    name: what it is in messages.
    """
    file = open_plain(folder / LOCK, "a+")
    try:
        lock_file(file, name, wait=False)
    except BlockingIOError:
        file.seek(0)
        raise CheckpointError(
            f"{name} is being written by another run ({file.read().strip()}): stop it, or choose another experiment_id"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
