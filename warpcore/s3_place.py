"""Checkpoints on S3: each process sends its own files, and the manifest, sent last, makes a checkpoint of them."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from warpcore.data.s3_files import abort_unfinished, fetch, remove, send, sizes_below
from warpcore.data.storage_protocol import ChangedShardError, StorageError
from warpcore.files import open_plain, write_whole
from warpcore.lease import Lease
from warpcore.locks import lock_file
from warpcore.places import (
    LOCK,
    MANIFEST,
    SNAPSHOTS,
    CheckpointError,
    compare,
    lock,
    partial_folder,
    read_manifest,
    state_folder,
    update_of,
)
from warpcore.processes import Processes
from warpcore.safe_json import MAX_JSON_BYTES
from warpcore.text import read_text

logger = logging.getLogger(__name__)

DAMAGED_MANIFEST = "damaged_manifest.json"
CONTINUED = ("metrics.jsonl", "notes.jsonl")
"""Files of a run that its next start goes on writing."""
MAX_CONTINUED_BYTES = 2**31
"""Of each: metrics are a line of some hundred bytes for each update."""
_OWN = (LOCK, ".machine")
"""Files of the folder that stay when it is emptied."""


class S3Place:
    """`url` on S3; `folder` is on the disk of each machine, and holds nothing that a next start needs."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.name, self.url = folder, url, url
        self.disk = f"{folder} (scratch_path)"
        self._lease = Lease(f"{url}/lease.json", url)
        self._lock = None
        self._sent: dict[Path, tuple[int, int]] = {}

    def take(self) -> None:
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder, f"{self.name} (by way of {self.disk})")
        self._lease.take()
        abort_unfinished(f"{self.url}/")
        whole = set(self.updates())
        names = sizes_below(f"{self.url}/state/")
        kept = whole | {update_of(name.split("/")[0]) for name in names if name.endswith(f"/{DAMAGED_MANIFEST}")}
        remove([f"{self.url}/state/{name}" for name in names if update_of(name.split("/")[0]) not in kept])

    def join(self, processes: Processes) -> bool:
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            machine = _mark(self.folder)
        machines = processes.gather(machine)
        first_here = machines.index(machine) == processes.rank
        if first_here:
            with self._explained():
                for path in self.folder.iterdir():
                    if path.name not in _OWN:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        processes.gather(None)  # everywhere, that is done before anything is fetched
        processes.on_main(self._fetch_continued)
        return first_here

    def _fetch_continued(self) -> None:
        for name in CONTINUED:
            url = f"{self.url}/{name}"
            size = sizes_below(url).get("")
            if size is not None and size > MAX_CONTINUED_BYTES:
                raise CheckpointError(
                    f"{url} has more than {MAX_CONTINUED_BYTES >> 20} MiB, which no run writes: remove it"
                )
            if size is not None:
                self._fetch_file(url, self.folder / name, size)

    def _fetch_file(self, url: str, path: Path, size: int) -> str:
        with self._explained():
            return fetch(url, path, size)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the disk refuses, which is no fault of what is on S3."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"scratch_path: cannot write to {self.folder}: {error}") from error

    def updates(self) -> list[int]:
        folders = [name.removesuffix(f"/{MANIFEST}") for name in sizes_below(f"{self.url}/state/")]
        return sorted(number for folder in folders if (number := update_of(folder)) is not None)

    def manifest(self, update: int) -> dict[str, dict] | str:
        url = f"{self._state(update)}/{MANIFEST}"
        size = sizes_below(url).get("", 0)
        if size > MAX_JSON_BYTES:
            return f"{MANIFEST} is longer than {MAX_JSON_BYTES >> 20} MiB"
        self._fetch_file(url, state_folder(self.folder, update) / MANIFEST, size)
        return read_manifest(state_folder(self.folder, update))

    def difference(self, update: int, name: str, recorded: Mapping) -> str | None:
        url, path = f"{self._state(update)}/{name}", state_folder(self.folder, update) / name
        size = sizes_below(url).get("")
        if size is None:
            return f"{name} is missing"
        if size != recorded["bytes"]:
            return compare(name, {"bytes": size}, recorded)
        try:
            return compare(name, {"bytes": size, "sha256": self._fetch_file(url, path, size)}, recorded)
        except ChangedShardError as error:
            return f"{name} cannot be read: {error}"

    def fetch(self, update: int, files: Mapping[str, Mapping]) -> None:
        state = state_folder(self.folder, update)
        for name, recorded in files.items():
            with self._explained():
                state.mkdir(parents=True, exist_ok=True)
                waiting = open_plain(state / f".{name}.lock", "a")
            with waiting:
                lock_file(waiting, self.disk)  # another process of this machine may be fetching it
                problem = None if (state / name).exists() else self.difference(update, name, recorded)
            if problem:
                raise CheckpointError(f"{self._state(update)} was whole a moment ago, but now {problem}")

    def set_aside(self, update: int) -> str:
        state, fetched = self._state(update), state_folder(self.folder, update) / MANIFEST
        if not fetched.exists():  # it was too long to be fetched
            fetched.parent.mkdir(parents=True, exist_ok=True)
            write_whole(fetched, "{}")
        send(fetched, f"{state}/{DAMAGED_MANIFEST}")
        remove([f"{state}/{MANIFEST}"])
        return f"{state}, without its {MANIFEST}"

    def clear(self, update: int) -> None:
        """What was fetched or sent before is not needed any more."""
        self.tidy()

    def bring(self, update: int, names: Sequence[str]) -> None:
        for name in names:
            send(partial_folder(self.folder, update) / name, f"{self._state(update)}/{name}")

    def publish(self, update: int, keep_last: int) -> None:
        partial = partial_folder(self.folder, update)
        files = read_manifest(partial)
        self.bring(update, ["state.json", ".metadata"])
        self.bring_files()
        there = sizes_below(f"{self._state(update)}/")
        for name, file in files.items():
            if there.get(name) != file["bytes"]:
                raise StorageError(f"{self._state(update)}/{name}: {there.get(name)} bytes arrived of {file['bytes']}")
        self._lease.renew()
        self.bring(update, [MANIFEST])
        try:
            for old in self.updates()[:-keep_last]:
                remove([f"{self._state(old)}/{MANIFEST}"])  # first: half removed, it must not look like a damaged one
                remove([f"{self._state(old)}/{name}" for name in sizes_below(f"{self._state(old)}/")])
        except (StorageError, FileNotFoundError) as error:  # the new one is whole all the same
            logger.warning("%s: older checkpoints stay: %s", self.name, error)

    def bring_files(self) -> None:
        self.check()
        for path in self._files():
            name = path.relative_to(self.folder)
            try:
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._sent.get(path) != version:
                    send(path, f"{self.url}/{name}")
                    self._sent[path] = version
                if name.parts[0] == SNAPSHOTS:  # that alone: beside it, the next one may be begun already
                    path.unlink()
            except FileNotFoundError:  # it was there for a moment only
                continue
        shutil.rmtree(self.folder / "backups", ignore_errors=True)

    def _files(self) -> list[Path]:
        """What belongs on S3 beside the checkpoints, which another thread may be removing from the folder."""
        found = []
        for folder, folders, names in os.walk(self.folder, onerror=_unless_gone):
            if Path(folder) == self.folder:
                folders[:] = [name for name in folders if name not in ("state", *_OWN)]
                names = [name for name in names if name not in _OWN]
            paths = (Path(folder, name) for name in names)
            found += [path for path in paths if not path.is_symlink() and path.is_file() and not _is_unfinished(path)]
        return sorted(found)

    def has(self, name: str) -> bool:
        return any(rest == "" or rest.startswith("/") for rest in sizes_below(f"{self.url}/{name}"))

    def tidy(self) -> None:
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def check(self) -> None:
        self._lease.check()

    def leave(self) -> None:
        if self._lock is not None:
            self._lease.release()
            self._lock.close()

    def _state(self, update: int) -> str:
        return f"{self.url}/state/{update:08d}"


def _is_unfinished(path: Path) -> bool:
    """Whether it is being written, by another thread."""
    return path.suffix == ".partial" or path.name.startswith(".")


def _unless_gone(error: OSError) -> None:
    """Of a folder that is listed: one that was removed meanwhile holds nothing."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _mark(folder: Path) -> str:
    """The same for all processes that see this folder, whatever their machines are called."""
    own = folder / f".machine.{uuid.uuid4().hex}"
    own.write_text(own.suffix, encoding="utf-8")
    try:
        os.link(own, folder / ".machine")
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return read_text(folder / ".machine")
