"""Where runs lie, a folder or a prefix of S3, as the run page reads them: nothing is written, and no link is followed
inside of a run."""

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from warpcore.data.storage import read_ranges
from warpcore.data.storage_protocol import StorageError
from warpcore.errors import UserError
from warpcore.files import open_plain
from warpcore.lease import LEASE_SECONDS
from warpcore.places import LOCK, WRITTEN
from warpcore.text import read_text

CONFIG, SAMPLES = "config.yaml", "samples"
MAX_LEVELS = 4
"""How deep in the folder a run may lie."""
QUIET_SECONDS = 600
"""A run of another machine that has written nothing for so long goes on no more."""
LEASE = "lease.json"
Files = dict[str, tuple[int, str]]
"""Size in bytes and version of files, by their names in the folder, such as `NAME/samples/00000100.png`."""


class RunPlace(Protocol):
    name: str
    """For people."""
    seconds: float
    """How often it is worth looking."""
    is_near: bool
    """Whether many small reads are quicker than a large one."""

    def files(self) -> Files:
        """What may belong to runs. Raises UserError where the place can't be read."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file, shorter where it ends, and empty where it is gone."""

    def lives(self, run: str, files: Files) -> bool:
        """Whether the process of a run is there."""

    def command_path(self, run: str) -> str:
        """Of a run, as commands take it."""


class LocalRuns:
    seconds, is_near = 2.0, True

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)

    def files(self) -> Files:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder of runs")
        try:
            os.scandir(self.folder).close()
        except OSError as error:
            raise UserError(f"{self.folder} can't be read: {error.strerror}") from None
        return dict(self._below(self.folder, "", MAX_LEVELS, set()))

    def _below(self, folder: Path, prefix: str, levels: int, seen: set[str]) -> Iterator[tuple[str, tuple[int, str]]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # it was removed meanwhile, or is none of ours
            return
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder that holds it
            return
        seen.add(real)
        is_run = any(entry.name == CONFIG for entry in entries)
        for entry in entries:
            name = f"{prefix}{entry.name}"
            try:
                is_folder, status = entry.is_dir(), entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if not is_folder:
                if stat.S_ISREG(status.st_mode):
                    yield name, (status.st_size, f"{status.st_mtime_ns}")
            elif is_run and entry.name == SAMPLES and not entry.is_symlink():
                yield from self._below(Path(entry.path), f"{name}/", 0, seen)
            elif levels and not (is_run and entry.name in WRITTEN) and not entry.name.startswith("."):
                yield from self._below(Path(entry.path), f"{name}/", levels - 1, seen)

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            with open_plain(self.folder / name, "rb") as file:
                return os.pread(file.fileno(), size, offset)
        except (OSError, UserError):  # gone, or a link by now
            return b""

    def lives(self, run: str, files: Files) -> bool:
        said = self.read(f"{run}{LOCK}", 0, 1000).decode(errors="replace").split()
        if said[:1] == ["process"] and said[3:] == [socket.gethostname()]:
            return self._is_locked(f"{run}{LOCK}", said[1])
        newest = max((int(version) for name, (_, version) in files.items() if name.startswith(run)), default=0)
        return bool(said) and time.time() - newest / 1e9 < QUIET_SECONDS

    def _is_locked(self, name: str, process: str) -> bool:
        """Whether it is still held, without taking it, which would be in the way of a run that starts."""
        try:
            held, inode = read_text(Path("/proc/locks")), os.stat(self.folder / name).st_ino
            return any("FLOCK" in line and f":{inode} " in line for line in held.splitlines())
        except OSError:  # no Linux
            return os.path.exists(f"/proc/{process}") or _is_there(process)

    def command_path(self, run: str) -> str:
        return os.path.abspath(self.folder / run)


def _is_there(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


class S3Runs:
    seconds, is_near = 10.0, False

    def __init__(self, url: str):
        self.name = self.url = url.rstrip("/")
        self._leases: dict[str, tuple[str, float]] = {}

    def files(self) -> Files:
        from warpcore.data.s3_listing import list_objects  # boto3 takes a second to import
        from warpcore.data.s3_requests import split

        bucket, prefix = split(f"{self.url}/")
        found = list_objects(bucket, prefix)
        return {url.removeprefix(f"{self.url}/"): (size, etag) for url, size, etag in found}

    def read(self, name: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            (found,) = read_ranges(f"{self.url}/{name}", [(offset, size)])
        except StorageError:
            raise
        except UserError:  # gone, or another by now
            return b""
        return found

    def lives(self, run: str, files: Files) -> bool:
        """A run writes its lease every few seconds, and removes it at its end."""
        if (lease := files.get(f"{run}{LEASE}")) is None:
            return False
        now = time.monotonic()
        version, since = self._leases.get(run, ("", now))
        if version != lease[1]:
            self._leases[run], since = (lease[1], now), now
        return now - since <= LEASE_SECONDS

    def command_path(self, run: str) -> str:
        return f"{self.url}/{run}".rstrip("/")


class Listing:
    """The files of a place, listed no more often than is worth it."""

    def __init__(self, place: RunPlace):
        self.place = place
        self._lock, self._files, self._listed = threading.Lock(), {}, -1e9

    def files(self) -> Files:
        with self._lock:
            if time.monotonic() - self._listed >= self.place.seconds / 2:
                self._files, self._listed = self.place.files(), time.monotonic()
            return self._files
