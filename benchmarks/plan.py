"""Start-up time and memory of the plan for 10, 1,000 and 100,000 indexed shards, and filters over a million rows.

    python3 benchmarks/plan.py

The data sets are synthetic: tars without content whose indexes, of 1,000 rows each, are links to one file. Every row
of the table is a process of its own, so that its memory is its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from warpcore.data import catalog as catalog_module
from warpcore.data import index
from warpcore.data.buckets import Buckets
from warpcore.data.catalog import open_catalog
from warpcore.data.filters import Filter
from warpcore.data.plan import Plan
from warpcore.data.shards import Shard, resolve_sources

ROWS_PER_SHARD = 1000
SHARD_BYTES = 1 << 30
"""Size of the tars: sparse files, which take no room. The members that their index names lie within it."""
MTIME_NS = 1_700_000_000_000_000_000
LINKS_PER_FILE = 50_000
FILTERS = (["aesthetic_score", "lambda s: s > 4.5"], [["width", "height"], "lambda w, h: w*h >= 589824"])


def synthetic_rows(count: int) -> pa.Table:
    """Index rows such as the tars of a photograph collection have."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(50_000, 900_000, count)
    offsets = np.cumsum(sizes) - sizes
    members = [["jpg", "json", "txt"]] * count
    return pa.table(
        {
            "key": [f"{number:09d}" for number in range(count)],
            "width": pa.array(rng.integers(500, 2000, count), pa.int32()),
            "height": pa.array(rng.integers(500, 2000, count), pa.int32()),
            "problem": pa.nulls(count, pa.string()),
            "member_names": pa.array(members, pa.list_(pa.string())),
            "member_offsets": pa.array(list(np.stack([offsets, offsets, offsets], 1)), pa.list_(pa.int64())),
            "member_sizes": pa.array(list(np.stack([sizes, sizes, sizes], 1)), pa.list_(pa.int64())),
            "json.aesthetic_score": rng.uniform(3, 7, count),
            "json.caption": [f"a picture of the thing number {number}" for number in range(count)],
        }
    )


# The tars of the benchmark are copies of one; as data of a run they would be read once.
catalog_module._without_doubles = lambda shards, _: sorted(shards, key=lambda shard: shard.url)
catalog_module.check_manifest_length = lambda *_: None  # hashes that are all the same take no room in a manifest


def make_data_set(folder: Path, num_shards: int) -> None:
    """Tars without content, all of one size and time, with links to one index."""
    summary = index.Summary(ROWS_PER_SHARD, 0, ("aesthetic_score", "caption"), (), ("jpg", "json", "txt"), "0" * 32)
    rows = synthetic_rows(ROWS_PER_SHARD)
    for number in range(num_shards):
        path = folder / f"{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(SHARD_BYTES)
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
        if number % LINKS_PER_FILE == 0:
            shard = Shard(str(path), SHARD_BYTES, f"mtime-{MTIME_NS}")
            index._write(shard, rows, summary)
            original = Path(f"{path}{index.INDEX_SUFFIX}")
        else:
            os.link(original, f"{path}{index.INDEX_SUFFIX}")


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: Path) -> dict[str, float]:
    """Times in seconds and memory in MB of one start."""
    before = resident_mb()
    times = [time.perf_counter()]
    catalog = open_catalog(resolve_sources(str(folder)))
    times.append(time.perf_counter())
    buckets = Buckets(768 * 768, 32, ["1/1", "4/3", "16/9"])
    filters = [Filter.parse(entry) for entry in FILTERS]
    plan = Plan(catalog, micro_batch_size=16, buckets=buckets, filters=filters)
    batches = plan.micro_batches()
    next(batches)
    times.append(time.perf_counter())
    start = time.perf_counter()
    taken = sum(len(micro_batch.samples) for micro_batch in islice(batches, 1000))
    return {
        "open_s": times[1] - times[0],
        "first_s": times[2] - times[1],
        "samples_per_s": taken / (time.perf_counter() - start),
        "plan_mb": resident_mb() - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "lanes": plan.num_lanes,
    }


def filter_seconds(count: int) -> float:
    rows = synthetic_rows(count)
    filters = [Filter.parse(entry) for entry in FILTERS]
    start = time.perf_counter()
    for condition in filters:
        condition.evaluate(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    print("shards   start     open s  first batch s  samples/s  memory of the plan MB  peak of the process MB  lanes")
    for num_shards in given.shards:
        with tempfile.TemporaryDirectory() as folder:
            make_data_set(Path(folder), num_shards)
            for label in ("first", "manifest"):
                command = [sys.executable, __file__, "--measure", folder]
                found = json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
                )
                print(
                    f"{num_shards:<8} {label:<8} {found['open_s']:7.2f} {found['first_s']:14.2f} "
                    f"{found['samples_per_s']:10.0f} {found['plan_mb']:22.1f} {found['peak_mb']:23.1f} "
                    f"{found['lanes']:6}",
                    flush=True,
                )
    print(f"a million rows through two filters: {filter_seconds(1_000_000):.2f} s")


if __name__ == "__main__":
    main()
