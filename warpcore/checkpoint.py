"""Checkpoints of a run, in its folder or on S3: everything needed to go on, and exported weights.

    state/<update>/            tensors (distributed checkpoint), state.json, and manifest.json with the size and hash
                               of each file; resuming reads nothing else
    NAME.safetensors           full weights with official names, the update in their metadata (`warpcore.exports`)
    backups/<update>/          copies of those weights that are never deleted
    post_hoc/<update>/         snapshots of averages (`warpcore.post_hoc_ema`), which are never deleted

A checkpoint is written aside by a background thread and published when it is complete (`warpcore.places`): a process
that dies at any moment leaves the last good one untouched. A run resumes only from what it has verified; a damaged one
is passed over. Loading runs no code (`warpcore.checkpoint_table`).
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from warpcore.checkpoint_reader import Reader
from warpcore.checkpoint_table import MAX_STATE_BYTES
from warpcore.errors import UserError
from warpcore.exports import Weights, file_metadata, publish, take
from warpcore.files import disk_error, open_to_read, refuse_links, write_whole
from warpcore.places import (
    MANIFEST,
    SNAPSHOTS,
    AnotherRun,
    CheckpointError,
    LocalPlace,
    Place,
    fingerprint,
    partial_folder,
    state_folder,
)
from warpcore.processes import Processes
from warpcore.quiet import ignore_expected_warnings
from warpcore.safe_json import load_json

ignore_expected_warnings()

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Only one process group may write them at a time.

    Args:
        folder: the run's; with `url`, a place on each machine's disk where files wait to be sent.
        url: of the run on S3. read_only: it is another run, whose checkpoints are only read.
        export_dtype: of the exported weights; None: as they are trained. export_bytes: the most that one file takes.

    Raises:
        CheckpointError, LeaseError: another process writes this experiment.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        keep_last: int = 2,
        url: str | None = None,
        export_dtype: torch.dtype | None = None,
        export_bytes: float = math.inf,
        read_only: bool = False,
    ):
        self.folder = folder
        self.processes = processes
        self.keep_last = keep_last
        self.export_dtype, self.export_bytes = export_dtype, export_bytes
        self._read_only = read_only
        self._place = AnotherRun(folder) if read_only else _place(folder, url)
        self._whole: int | None = None
        self._files: Mapping[str, Mapping] = {}
        self._failed = False
        self._at_rest = False
        # Collectives of the writing thread must not mix with those of training.
        self._group = processes.another_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._files_pending: Future | None = None
        try:
            processes.on_main(self._place.take)
            self._first_here = self._place.join(processes)
        except BaseException:
            self._place.leave()
            raise

    @property
    def name(self) -> str:
        """Where the run is: its folder, or its address on S3."""
        return self._place.name

    def newest(self, check: Callable[[dict], None] = lambda values: None) -> int | None:
        """Update of the newest whole checkpoint, None where there is none at all; the same on every process.

        Args:
            check: of a checkpoint's `values`; raises CheckpointError where they are not what was saved.

        Every file is read once, by one process, and compared with the manifest; `load` brings what a process needs to
        where it is. Damaged checkpoints that are newer are renamed, not removed.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        problems: dict[int, str] = {}
        for update in reversed(self.processes.on_main(self._place.updates)):
            files = self.processes.on_main(lambda sought=update: self._place.manifest(sought))
            problem = self._problem(update, files)
            if problem is None:
                self._files = files
                self._fetch(update, {"state.json", ".metadata"})
                problem = self.processes.on_main(lambda sought=update: self._problem_of_content(sought, check))
            if problem is None:
                self.processes.on_main(lambda whole=update: self._pass_over(problems, whole))
                self._whole = update
                return update
            problems[update] = problem
        if problems:
            told = "; ".join(f"update {update}: {problem}" for update, problem in problems.items())
            if self._read_only:
                raise CheckpointError(f"load: no checkpoint in {self._place.name} is whole ({told}): name another run")
            raise CheckpointError(
                f"no checkpoint of this run is whole ({told}). Restore one, or remove {self._place.name}/state to "
                "begin the run from scratch"
            )
        return None

    def _problem(self, update: int, files: Mapping[str, Mapping] | str) -> str | None:
        """Why a checkpoint is not whole. The processes share the reading."""
        if isinstance(files, str):
            return files
        # Neighbours get what neighbours wrote, which is what sharding gives them too: on S3 they have it then.
        writers = 1 + max(map(writer_of, files))
        own = [n for n in sorted(files) if writer_of(n) * self.processes.count // writers == self.processes.rank]
        found = (self._place.difference(update, name, files[name]) for name in own)
        everyone = self.processes.gather(next(filter(None, found), None))
        return next(filter(None, everyone), None)

    def _problem_of_content(self, update: int, check: Callable[[dict], None]) -> str | None:
        """Why what has the right hashes is no checkpoint all the same, as its manifest may be from anyone too."""
        try:
            check(self.values(update))
            self.stored(update)
        except CheckpointError as error:
            return str(error)
        return None

    def _fetch(self, update: int, names: Collection[str]) -> None:
        """Bring files of the checkpoint that `newest` found to where they are read."""
        if strange := sorted(set(names) - self._files.keys()):
            raise CheckpointError(
                f"the checkpoint of update {update} in {self._place.name} asks for {strange[0]}, which its {MANIFEST} "
                "does not list"
            )
        self._place.fetch(update, {name: self._files[name] for name in names})

    def _pass_over(self, problems: Mapping[int, str], whole: int) -> None:
        for update, problem in problems.items():
            aside = self._place.set_aside(update)
            logger.warning(
                "the checkpoint of update %d is damaged (%s): it is now %s, and the run goes on from update %d",
                update, problem, aside, whole,
            )  # fmt: skip

    def export(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], update: int) -> Weights:
        """Take weights to export as the file `name` out of networks that are trained on (collective), for `save`."""
        self.wait()  # what the save before may still be writing has the same name
        about = file_metadata(metadata, update)
        if self.processes.is_main:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return take(self.folder / name, tensors, about, self.export_dtype, self.export_bytes, self.processes)

    def save(
        self,
        update: int,
        tensors: Mapping[str, Tensor],
        values: Mapping,
        weights: Mapping[str, Weights],
        metadata: Mapping[str, str],
        backup: bool = False,
    ) -> None:
        """Begin to save; training may go on as soon as this returns.

        Args:
            update: the number of the last finished update.
            tensors: everything needed to go on, by name; may be sharded.
            values: the rest of it, as JSON.
            weights: exported weights, by file name, as `export` gives them; needed on the main process only.
            metadata: what those files say about themselves.
            backup: also keep a copy of `weights` for good.
        """
        self.wait()
        self._at_rest = False
        if self._first_here:
            self._place.clear(update)
        partial = partial_folder(self.folder, update)
        refuse_links(partial.parent, partial)
        writer = FileSystemWriter(partial)
        # What several processes have is spread over their files; but if that is a few small things, one file has them
        # all, and not every process needs to read every file.
        sharded = self.processes.mesh is not None and self.processes.mesh.size(0) == 1
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=sharded)
        written = dcp.async_save(
            dict(tensors),
            storage_writer=writer,
            planner=planner,
            process_group=self._group,
            no_dist=self._group is None,
        )
        about = file_metadata(metadata, update)
        self._pending = self._thread.submit(self._publish, written, update, dict(values), dict(weights), about, backup)

    def bring_files(self) -> None:
        """Begin to bring what else is in the run's folder to where people look for it."""
        if not self.processes.is_main:
            return
        if self._files_pending is not None and self._files_pending.done():
            self._files_pending.result()
            self._files_pending = None
        if self._files_pending is None:
            self._files_pending = self._thread.submit(self._place.bring_files)

    def has(self, name: str) -> bool:
        """Whether a file of the run is where people look for it."""
        return self._place.has(name)

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting."""
        self._place.check()
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the pending save is whole.

        Raises:
            CheckpointError: it could not be written; the one before it is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._failed = True
            pending.result()
            self._failed, self._at_rest = False, True

    def close(self) -> None:
        try:
            self.wait()
            if not self._failed and self.processes.is_main:  # what came since the last time, too
                self._thread.submit(self._place.bring_files).result()
            if self._at_rest and self._first_here:
                self._place.tidy()
        finally:
            self._thread.shutdown()
            self._place.leave()

    def values(self, update: int) -> dict:
        """What was saved as JSON.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with open_to_read(state_folder(self.folder, update) / "state.json") as file:
                values = load_json(file, MAX_STATE_BYTES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"state.json cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError("state.json is no JSON object")
        return values

    def stored(self, update: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor of a checkpoint, by name."""
        entries = self._reader(update).read_metadata().state_dict_metadata
        return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}

    def load(self, update: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place, resharding where the number of processes changed."""
        reader, alone = self._reader(update), self._group is None
        try:
            dcp.load(dict(tensors), storage_reader=reader, process_group=self._group, no_dist=alone)
        except CheckpointException as error:  # no Exception: nothing else would catch it
            cause = _cause(error)
            if isinstance(cause, UserError):  # such as a disk or a bucket that refuses, which says more itself
                raise CheckpointError(str(cause)) from error
            raise CheckpointError(
                f"the checkpoint of update {update} in {self._place.name} cannot be read: {_reason(error)}. "
                f"Remove state/{update:08d} there to go on from the one before"
            ) from error
        self._at_rest = True  # the others have read it too, or this would not have ended

    def _reader(self, update: int) -> "Reader":
        name = f"{self._place.name}/state/{update:08d}/.metadata"
        return Reader(state_folder(self.folder, update), name, lambda names: self._fetch(update, names))

    def _publish(self, written: Future, update: int, values: dict, weights: dict, about: dict, backup: bool) -> None:
        """Wait for DCP, then finish the checkpoint on the main process; every process learns how that went."""
        problem, files, partial = None, {}, partial_folder(self.folder, update)
        try:
            names = {stored.relative_path for stored in written.result().storage_data.values()}
            own = [name for name in names if writer_of(name) == self.processes.rank]
            files = {name: fingerprint(partial / name) for name in own}
            self._place.bring(update, own)
        except (Exception, CheckpointException) as error:  # DCP's own exception is no Exception
            problem = self._problem_of_saving(error)
        everyone = self._gather((problem, files))
        problem = next(filter(None, (problem for problem, _ in everyone)), None)
        if problem is None and self.processes.is_main:
            files = {name: file for _, files in everyone for name, file in files.items()}
            assert files.keys() == names, "a file was written that no process knows as its own"
            try:
                self._finish(update, files, values, weights, about, backup)
            except Exception as error:
                problem = self._problem_of_saving(error)
        problem = self._gather(problem)[0]
        if problem is None:
            self._whole = update
            return
        if self._first_here:
            shutil.rmtree(partial, ignore_errors=True)
            for leftover in (*self.folder.glob("*.partial"), *self.folder.glob(f"{SNAPSHOTS}/*/*/*.partial")):
                leftover.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not save update {update} in {self._place.name}: {problem}\n"
            + (f"The checkpoint of update {self._whole} is whole" if self._whole else "No checkpoint is there yet")
            + ": once that is fixed, start again with the same command."
        )

    def _problem_of_saving(self, error: BaseException) -> str:
        """What stands in the way of a checkpoint, and what to do where the error does not say that itself."""
        cause = _cause(error)
        if isinstance(cause, UserError | PermissionError):
            return str(cause)
        try:
            free_gib = shutil.disk_usage(self.folder).free / 2**30
        except OSError:
            return _reason(cause)  # where the folder itself is gone, that says so
        return f"{_reason(cause)}. {free_gib:.2f} GiB are free in {self._place.disk}; a full disk needs room."

    def _gather(self, value) -> list:
        """`value` of every process, by the writing threads."""
        everyone = [value] * self.processes.count
        if self._group is not None:
            dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def _finish(self, update: int, files: dict, values: dict, weights: dict, about: dict, backup: bool) -> None:
        """Add what only the main process writes, and publish. `files`: fingerprints of what all have written."""
        partial = partial_folder(self.folder, update)
        write_whole(partial / "state.json", json.dumps(values))
        files |= {name: fingerprint(partial / name) for name in ("state.json", ".metadata")}
        write_whole(partial / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
        copies = self.folder / "backups" / f"{update:08d}" if backup else None
        for name, exported in weights.items():
            publish(exported, self.folder / name, about, self.export_dtype, None if "/" in name else copies)
        self._place.publish(update, self.keep_last)


def _place(folder: Path, url: str | None) -> Place:
    if url is None:
        return LocalPlace(folder)
    from warpcore.s3_place import S3Place  # boto3 takes a second to import

    return S3Place(folder, url)


def writer_of(name: str) -> int:
    """The process that wrote a file of a checkpoint: DCP puts its rank into the names of what it writes."""
    found = re.match(r"__(\d{1,9})_", name)
    return int(found[1]) if found else 0


def _cause(error: BaseException) -> BaseException:
    """DCP wraps what each rank raised: the first of those."""
    if isinstance(error, CheckpointException) and error.failures:
        return disk_error(next(iter(error.failures.values()))[0])
    return disk_error(error)


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}"
