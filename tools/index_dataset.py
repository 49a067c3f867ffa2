"""Indexes a data set, so that training on it starts at once.

    python3 tools/index_dataset.py data/shards --workers 8
    python3 tools/index_dataset.py s3://bucket/shards --cache s3://mine/indexes
    srun --nodes 4 --ntasks-per-node 1 python3 tools/index_dataset.py s3://bucket/shards --cache s3://mine/indexes

Writes NAME.tar.index.parquet beside every tar that has none of its present content, and dataset.manifest.parquet in
every folder of tars; with --cache (or WARPCORE_INDEX_CACHE, which training reads too) to that folder or URL instead.
Started again, it goes on where it stopped. The processes of torchrun or srun share the tars. Training indexes tars by
itself where that was not done, but with one process.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

from tools.arguments import worker_count
from tools.shared_work import ALONE, SharedWork
from warpcore.data.catalog import read_summaries, told_of_older_indexes, write_manifests
from warpcore.data.identity import HASHED_BYTES
from warpcore.data.index import Summary, index_shard
from warpcore.data.member_headers import COUNTED_EXTENSIONS, TEXT_EXTENSIONS
from warpcore.data.shards import Shard, resolve_sources
from warpcore.data.sidecars import CACHE_VARIABLE
from warpcore.data.storage import complete_url, is_remote, storage_for
from warpcore.data.tars import BLOCK_BYTES, read_samples
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_folder
from warpcore.peers import tell_once
from warpcore.processes import Processes, start_processes, stop_processes
from warpcore.progress_bar import ProgressBar
from warpcore.text import format_bytes

REMOTE_BLOCK_BYTES = 512 << 10
"""What is read at least, wherever something is read, of a tar that is not here."""
MAX_REPORTED = 20


def index_dataset(paths: Sequence[str], num_workers: int | None = None, processes: Processes = ALONE) -> None:
    """Index every tar that the paths name (as in `webdataset_path`) and write the manifests.

    num_workers: of each of the `processes`, which share the work (collective); by default one per CPU core.

    Raises:
        UserError: some tars can't be used; all others are indexed nevertheless.
    """
    work = SharedWork(processes)
    known: dict[Shard, Summary | None] = {}  # the main process alone needs it all

    def look() -> list[Shard]:
        known.update(_look(paths))
        missing = (shard for shard, summary in known.items() if summary is None)
        return sorted(missing, key=lambda shard: (-shard.size_bytes, shard.url))

    by_size = work.on_main(look)
    hosts = work.do(socket.gethostname)
    workers = num_workers or -(-(os.cpu_count() or 1) // hosts.count(socket.gethostname()))
    made = work.do(lambda: _index(work.own(by_size), workers, processes.is_main))
    known |= {shard: summary for found, _ in made for shard, summary in found.items()}
    work.on_main(lambda: _finish(known, sorted(chain.from_iterable(failures for _, failures in made))))


def _look(paths: Sequence[str]) -> dict[Shard, Summary | None]:
    """Which tars there are, and the summaries of those that have an index; says what will be read of the others."""
    shards = [shard for source in resolve_sources(list(paths)) for shard in source.shards]
    known = read_summaries(shards)
    missing = [shard for shard, summary in known.items() if summary is None]
    print(f"{len(shards)} tars, {format_bytes(sum(shard.size_bytes for shard in shards))}; {len(missing)} to index")
    if missing:
        print(f"about {format_bytes(_estimate(missing))} will be read: headers, texts, and the start of other members")
        if told := told_of_older_indexes(missing):
            print(told)
    return known


def _finish(known: dict[Shard, Summary | None], failures: list[str]) -> None:
    """Write the manifests and say what is there."""
    whole = {shard: summary for shard, summary in known.items() if summary is not None}
    locations = write_manifests(list(whole), {shard.url: summary for shard, summary in whole.items()})
    rows, problems = (sum(getattr(summary, name) for summary in whole.values()) for name in ("rows", "problems"))
    print(f"{rows} samples, {problems} of them without a usable picture or video; wrote {', '.join(locations)}")
    if failures:
        more = [f"and {len(failures) - MAX_REPORTED} more"] if len(failures) > MAX_REPORTED else []
        raise UserError(f"{len(failures)} tars can't be used:\n" + "\n".join(failures[:MAX_REPORTED] + more))


def _estimate(shards: Sequence[Shard]) -> int:
    """Bytes to read, extrapolated from the smallest tar that is whole."""
    for shard in sorted(shards, key=lambda shard: shard.size_bytes):
        try:
            with storage_for(shard.url).open(shard.url) as file:
                samples = read_samples(file, shard.url, shard.size_bytes)
        except (UserError, OSError):  # it will be told when it is indexed
            continue
        members = [(name, size) for sample in samples for name, (_, size) in sample.members.items()]
        read = BLOCK_BYTES * len(members)
        whole = {*TEXT_EXTENSIONS, *COUNTED_EXTENSIONS}
        read += sum(size if name in whole else min(size, HASHED_BYTES) for name, size in members)
        if is_remote(shard.url):
            read = REMOTE_BLOCK_BYTES * len(members)
        share = min(1.0, read / shard.size_bytes)
        return int(share * sum(shard.size_bytes for shard in shards))
    return 0


def _index(shards: Sequence[Shard], num_workers: int, shown: bool) -> tuple[dict[Shard, Summary], list[str]]:
    found: dict[Shard, Summary] = {}
    failures: list[str] = []
    if not shards:
        return found, failures
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(shards)), context, initializer=_end_with_parent) as pool:
        tasks = {pool.submit(index_shard, shard): shard for shard in shards}
        with ProgressBar(
            total=sum(shard.size_bytes for shard in shards), unit="B", unit_scale=True, disable=not shown
        ) as progress:
            for task in as_completed(tasks):
                shard = tasks[task]
                try:
                    found[shard] = task.result()
                except (UserError, OSError) as error:
                    failures.append(str(error) if isinstance(error, UserError) else f"{shard.url}: {error}")
                progress.update(shard.size_bytes)
    return found, failures


def _end_with_parent() -> None:
    """Or a worker would wait for ever when its parent is killed."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="tars, folders, globs, brace ranges, s3:// of those")
    parser.add_argument(
        "--workers", type=worker_count, help="of each process; default: one per CPU core of the machine"
    )
    parser.add_argument("--cache", metavar="PLACE", help="folder or URL for the indexes, if not beside the tars")
    given = parser.parse_args(arguments)
    processes = start_processes("cpu")
    if given.cache:
        if not is_remote(given.cache):
            check_folder(Path(complete_url(given.cache)), "the indexes")
        os.environ[CACHE_VARIABLE] = complete_url(given.cache)
        if processes.is_main:
            print(f"for training: export {CACHE_VARIABLE}={os.environ[CACHE_VARIABLE]}")
    try:
        index_dataset(given.paths, given.workers, processes)
    finally:
        stop_processes()


if __name__ == "__main__":
    run_script(main, tell_once)
