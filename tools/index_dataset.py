"""Indexes a data set, so that training on it starts at once.

    python3 tools/index_dataset.py data/shards --workers 8
    python3 tools/index_dataset.py s3://bucket/shards --cache s3://mine/indexes

Writes NAME.tar.index.parquet beside every tar that has none of its present content, and dataset.manifest.parquet in
every folder of tars; with --cache (or WARPCORE_INDEX_CACHE, which training reads too) to that folder or URL instead.
Started again, it goes on where it stopped. Training indexes tars by itself where that was not done, but with one
process.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm import tqdm

from warpcore.data.catalog import read_summaries, told_of_older_indexes, write_manifests
from warpcore.data.identity import HASHED_BYTES
from warpcore.data.index import Summary, index_shard
from warpcore.data.member_headers import TEXT_EXTENSIONS
from warpcore.data.shards import Shard, resolve_sources
from warpcore.data.sidecars import CACHE_VARIABLE
from warpcore.data.storage import complete_url, is_remote, storage_for
from warpcore.data.tars import BLOCK_BYTES, read_samples
from warpcore.errors import UserError, run_script

REMOTE_BLOCK_BYTES = 512 << 10
"""What is read at least, wherever something is read, of a tar that is not here."""
MOST_TOLD = 20


def index_dataset(paths: Sequence[str], num_workers: int) -> None:
    """Index every tar that the paths name (as in `webdataset_path`) and write the manifests.

    Raises:
        UserError: some tars can't be used; all others are indexed nevertheless.
    """
    shards = [shard for source in resolve_sources(list(paths)) for shard in source.shards]
    known = read_summaries(shards)
    missing = [shard for shard, summary in known.items() if summary is None]
    print(f"{len(shards)} tars, {_bytes(sum(shard.size_bytes for shard in shards))}; {len(missing)} to index")
    failures: list[str] = []
    if missing:
        print(f"about {_bytes(_estimate(missing))} will be read: headers, texts, and the start of all other members")
        if told := told_of_older_indexes(missing):
            print(told)
        found, failures = _index(missing, num_workers)
        known |= found
    whole = {shard: summary for shard, summary in known.items() if summary is not None}
    locations = write_manifests(list(whole), {shard.url: summary for shard, summary in whole.items()})
    rows, problems = (sum(getattr(summary, name) for summary in whole.values()) for name in ("rows", "problems"))
    print(f"{rows} samples, {problems} of them without a usable picture; wrote {', '.join(locations)}")
    if failures:
        more = [f"and {len(failures) - MOST_TOLD} more"] if len(failures) > MOST_TOLD else []
        raise UserError(f"{len(failures)} tars can't be used:\n" + "\n".join(failures[:MOST_TOLD] + more))


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
        read += sum(size if name in TEXT_EXTENSIONS else min(size, HASHED_BYTES) for name, size in members)
        if is_remote(shard.url):
            read = REMOTE_BLOCK_BYTES * len(members)
        share = min(1.0, read / shard.size_bytes)
        return int(share * sum(shard.size_bytes for shard in shards))
    return 0


def _index(shards: Sequence[Shard], num_workers: int) -> tuple[dict[Shard, Summary], list[str]]:
    found: dict[Shard, Summary] = {}
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(shards)), context, initializer=_end_with_parent) as pool:
        tasks = {pool.submit(index_shard, shard): shard for shard in shards}
        with tqdm(total=sum(shard.size_bytes for shard in shards), unit="B", unit_scale=True) as progress:
            for task in as_completed(tasks):
                shard = tasks[task]
                try:
                    found[shard] = task.result()
                except (UserError, OSError) as error:
                    failures.append(str(error) if isinstance(error, UserError) else f"{shard.url}: {error}")
                progress.update(shard.size_bytes)
    return found, sorted(failures)


def _end_with_parent() -> None:
    """Or a worker would wait for ever when its parent is killed."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="tars, folders, globs, brace ranges, s3:// of those")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per CPU core"
    )
    parser.add_argument("--cache", metavar="PLACE", help="folder or URL for the indexes, if not beside the tars")
    given = parser.parse_args(arguments)
    if given.workers < 1:
        raise UserError(f"--workers is at least 1, found {given.workers}")
    if given.cache:
        os.environ[CACHE_VARIABLE] = complete_url(given.cache)
        print(f"for training: export {CACHE_VARIABLE}={os.environ[CACHE_VARIABLE]}")
    index_dataset(given.paths, given.workers)


if __name__ == "__main__":
    run_script(main)
