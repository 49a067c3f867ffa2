"""Scale on paper: planning for 10 thousand to a million shards and 8 to 8,192 processes, and how well it shuffles.

    python3 benchmarks/scale.py [--quick]

No such data set exists here. A storage of its own scheme, `paper:`, lists as many tars as its URL says, of 10,000 rows
each, and gives them all the same index; catalog, plan and lanes are the real ones. Every row of a table is a process
of its own, so that its memory is its own. Requests and bytes are those that the plan's samples lead to where near
ranges are joined as `s3:` does; nothing is transferred.
"""

import argparse
import ctypes
import gc
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from math import gcd, log
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from warpcore.data import catalog as catalog_module
from warpcore.data import index, storage
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog, open_catalog, write_manifests
from warpcore.data.index import INDEX_SUFFIX, Summary
from warpcore.data.plan import Plan
from warpcore.data.s3 import COALESCED_BYTES
from warpcore.data.samples import MicroBatch, picture_member
from warpcore.data.shards import Shard, resolve_sources

ROWS_PER_SHARD = 10_000
SHARD_BYTES = 5_000_000_000
MICRO_BATCH_SIZE = 16
UPDATE_SAMPLES = 2048
"""Samples of the updates whose mixture is looked at."""
MEASURED_MICRO_BATCHES = 32
PLANNED_SHARDS = 100_000
PROCESSES = (8, 12, 64, 512, 8192)
GROUPS = [(1, 16_384), (1, 65_536), (8, 16_384), (64, 4_096), (64, 16_384), (256, 4_096), (1024, 1_024)]
"""Lanes, and rows of a group of theirs; 64 and 16,384 are the defaults for this data set."""
RATIOS = [1 / 1, 1 / 2, 2 / 3, 3 / 4, 9 / 16, 5 / 6]


class PaperStorage:
    """`paper://NUMBER`: a folder of NUMBER tars."""

    written: dict[str, bytes] = {}

    def tars(self, folder: str) -> list[tuple[str, int, str]]:
        number = int(folder.removeprefix("paper://"))
        return [(f"{folder}/{one:07d}.tar", SHARD_BYTES, "0123456789abcdef0123456789abcdef") for one in range(number)]

    def is_folder(self, url: str) -> bool:
        return not url.endswith(".tar")

    def stats(self, urls: Sequence[str]) -> dict[str, tuple[int, str]]:
        return {}

    def open(self, url: str) -> BinaryIO:
        if url.endswith(INDEX_SUFFIX):
            return io.BytesIO(the_index())
        if url not in self.written:
            raise FileNotFoundError(url)
        return io.BytesIO(self.written[url])

    def write(self, url: str, content: bytes) -> None:
        self.written[url] = content


storage._STORAGES["paper"] = PaperStorage


@cache
def the_index() -> bytes:
    """Rows such as those of a collection of photographs, about 500 kB each."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(50_000, 900_000, ROWS_PER_SHARD), rng.integers(50, 500, ROWS_PER_SHARD)], 1)
    starts = np.cumsum(sizes.ravel() + 1024).reshape(-1, 2) - sizes  # a header before each member
    rows = pa.table(
        {
            "key": [f"{number:09d}" for number in range(ROWS_PER_SHARD)],
            "width": pa.array(rng.integers(500, 2000, ROWS_PER_SHARD), pa.int32()),
            "height": pa.array(rng.integers(500, 2000, ROWS_PER_SHARD), pa.int32()),
            "problem": pa.nulls(ROWS_PER_SHARD, pa.string()),
            "member_names": pa.array([["jpg", "txt"]] * ROWS_PER_SHARD, pa.list_(pa.string())),
            "member_offsets": pa.array(list(starts), pa.list_(pa.int64())),
            "member_sizes": pa.array(list(sizes), pa.list_(pa.int64())),
        }
    )
    tar = Shard("paper://0/any.tar", *PaperStorage().tars("paper://1")[0][1:])
    index._write(tar, rows, SUMMARY)
    return PaperStorage.written[tar.url + INDEX_SUFFIX]


# The tars of the benchmark are copies of one; as data of a run they would be read once.
catalog_module._without_doubles = lambda shards, _: sorted(shards, key=lambda shard: shard.url)

SUMMARY = Summary(ROWS_PER_SHARD, 0, (), (), ("jpg", "txt"), "0" * 32)


def open_paper(num_shards: int) -> tuple[Catalog, float]:
    """The catalog of `num_shards` shards whose manifest is there, and the seconds that took."""
    url = f"paper://{num_shards}"
    shards = [Shard(*one) for one in PaperStorage().tars(url)]
    write_manifests(shards, {shard.url: SUMMARY for shard in shards})
    del shards
    began = time.perf_counter()
    return open_catalog(resolve_sources(url)), time.perf_counter() - began


def make_plan(catalog: Catalog, **settings) -> Plan:
    return Plan(
        catalog, micro_batch_size=MICRO_BATCH_SIZE, buckets=Buckets.for_image_size(1024, RATIOS),
        captions=CaptionGetter.parse(["txt", "identity"]), **settings,
    )  # fmt: skip


# --- start-up, by number of shards


def start_up(num_shards: int) -> dict:
    """Seconds, and sizes in MB."""
    the_index()
    before = resident_mb()
    catalog, open_seconds = open_paper(num_shards)
    sent = pickle.dumps(catalog)
    received, catalog_mb = _timed(partial(pickle.loads, sent)), len(sent) / 1e6
    plan_seconds = _timed(lambda: make_plan(catalog))
    plan = make_plan(catalog)
    print_seconds = _timed(lambda: plan.fingerprint)
    first_seconds = _timed(lambda: next(plan.micro_batches(num_processes=512)))
    del sent
    memory = resident_mb() - before - sum(map(len, PaperStorage.written.values())) / 1e6
    states = {one.lane: one.state for one in islice(plan.micro_batches(), 40 * plan.num_lanes)}
    return {
        "open_s": open_seconds, "catalog_mb": catalog_mb, "receive_s": received, "plan_s": plan_seconds,
        "fingerprint_s": print_seconds, "first_s": first_seconds, "memory_mb": memory, "lanes": plan.num_lanes,
        "lanes_mb": len(json.dumps(states)) / 1e6, "fingerprint_mb": len(json.dumps(plan.fingerprint)) / 1e6,
    }  # fmt: skip


# --- planning, by number of processes


def planning(num_shards: int, num_processes: int) -> dict:
    """Of one process, per update of its own."""
    catalog, _ = open_paper(num_shards)
    plan = make_plan(catalog)
    num_lanes = plan.num_lanes // gcd(plan.num_lanes, num_processes)
    before = resident_mb()
    micro_batches = plan.micro_batches(rank=num_processes // 2, num_processes=num_processes)
    first_seconds = _timed(partial(next, micro_batches))
    for _ in range(plan.num_lanes):  # by now every lane has loaded its first group
        next(micro_batches)
    began = time.perf_counter()
    taken = list(islice(micro_batches, MEASURED_MICRO_BATCHES))
    seconds = time.perf_counter() - began
    requests = [spans_of(micro_batch) for micro_batch in taken]
    planned_rows = MICRO_BATCH_SIZE * num_lanes * num_processes / plan.num_lanes  # its own, and those of others
    return {
        "lanes": num_lanes,
        "first_s": first_seconds,
        "milliseconds": 1000 * seconds / len(taken),
        "memory_mb": resident_mb() - before,
        "requests": num_processes * statistics.mean(len(spans) for spans in requests),
        "gigabytes": num_processes * statistics.mean(sum(size for _, size in spans) for spans in requests) / 1e9,
        "index_requests": num_processes * planned_rows / ROWS_PER_SHARD,
    }


def spans_of(micro_batch: MicroBatch) -> list[tuple[int, int]]:
    """(offset, size) of the requests for its bytes."""
    wanted = defaultdict(list)
    for sample in micro_batch.samples:
        wanted[sample.shard] += [sample.members[name] for name in (picture_member(sample.members), "txt")]
    return [span for ranges in wanted.values() for span in _joined(sorted(ranges))]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for offset, size in ranges:
        if spans and offset - sum(spans[-1]) <= COALESCED_BYTES:
            spans[-1] = (spans[-1][0], offset + size - spans[-1][0])
        else:
            spans.append((offset, size))
    return spans


# --- shuffling, by lanes and rows of a group


def shuffling(num_lanes: int, group_rows: int, num_shards: int = 1000) -> dict:
    """How far neighbours of a tar are spread, and how many tars an update sees."""
    catalog, _ = open_paper(num_shards)
    plan = make_plan(catalog, num_lanes=num_lanes, group_rows=group_rows)
    per_update = UPDATE_SAMPLES // MICRO_BATCH_SIZE
    update = [sample.shard for one in islice(plan.micro_batches(), per_update) for sample in one.samples]
    # One lane's micro-batches are those of a process among as many as there are lanes.
    own = islice(plan.micro_batches(rank=0, num_processes=num_lanes), group_rows // MICRO_BATCH_SIZE)
    places = {
        (sample.shard, int(sample.key)): number * num_lanes * MICRO_BATCH_SIZE
        for number, one in enumerate(own)
        for sample in one.samples
    }
    distances = [
        abs(place - places[shard, row + 1]) for (shard, row), place in places.items() if (shard, row + 1) in places
    ]
    return {
        "tars": len(set(update)),
        "most": max(update.count(shard) for shard in set(update)) / len(update),
        "distance": statistics.median(distances) / UPDATE_SAMPLES,
        "together": sum(distance < UPDATE_SAMPLES for distance in distances) / len(distances),
        "rows_of_8": num_lanes // gcd(num_lanes, 8) * group_rows,
    }


def resident_mb() -> float:
    """Memory of this process, without what it could give back."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# --- tables

TABLES = {"start_up": start_up, "planning": planning, "shuffling": shuffling}


def measure(table: str, *numbers: int) -> dict:
    """A row of a table, in a process of its own."""
    command = [sys.executable, __file__, "--measure", table, *map(str, numbers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)


def print_table(title: str, columns: dict[str, tuple[str, str]], rows: Iterable[dict]) -> list[dict]:
    """As Markdown; returns the rows. `columns`: heading -> key of a row and how its number is formatted."""
    printed = []
    print(f"{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(format(row[key], how) for key, how in columns.values())} |", flush=True)
        printed.append(row)
    print()
    return printed


def growth(rows: Sequence[dict], against: str, promised: dict[str, tuple[str, float]]) -> Iterator[dict]:
    """How quantities grow from the first row to the last, as a power of `against`, beside what is promised."""
    first, last = rows[0], rows[-1]
    for key, (what, most) in promised.items():
        power = log(last[key] / first[key]) / log(last[against] / first[against])
        yield {
            "what": what, "against": against, "from": first[key], "to": last[key], "power": power, "most": most,
            "holds": "yes" if power <= most + TOLERANCE else "NO",
        }  # fmt: skip


START_UP = {
    "shards": ("shards", ","), "open the manifest s": ("open_s", ".2f"), "catalog to send MB": ("catalog_mb", ".1f"),
    "receive s": ("receive_s", ".2f"), "plan s": ("plan_s", ".2f"), "fingerprint s": ("fingerprint_s", ".2f"),
    "first micro-batch s": ("first_s", ".2f"), "memory MB": ("memory_mb", ".0f"), "lanes": ("lanes", ","),
    "lane states MB": ("lanes_mb", ".2f"), "fingerprint MB": ("fingerprint_mb", ".2f"),
}  # fmt: skip
PLANNING = {
    "processes": ("processes", ","), "lanes of one": ("lanes", ","), "first micro-batch s": ("first_s", ".2f"),
    "planning ms per update": ("milliseconds", ".1f"), "memory MB": ("memory_mb", ".0f"),
    "requests per update": ("requests", ",.0f"), "GB per update": ("gigabytes", ",.2f"),
    "index requests per update": ("index_requests", ",.1f"),
}  # fmt: skip
SHUFFLING = {
    "lanes": ("lanes", ","), "rows of a group": ("rows", ","), f"tars in {UPDATE_SAMPLES:,} samples": ("tars", ","),
    "share of the most frequent": ("most", ".1%"), "neighbours: median distance in updates": ("distance", ".1f"),
    "neighbours in one update": ("together", ".1%"), "rows in memory, 8 processes": ("rows_of_8", ","),
}  # fmt: skip


GROWTH = {
    "quantity": ("what", ""), "with the number of": ("against", ""), "from": ("from", ",.3g"), "to": ("to", ",.3g"),
    "power": ("power", ".2f"), "promised at most": ("most", ".0f"), "holds": ("holds", ""),
}  # fmt: skip
TOLERANCE = 0.15
"""Of a power: times are measured, and the smallest sizes have costs of their own."""
PROMISED_BY_SHARDS = {
    "open_s": ("seconds to open the manifest", 1.0), "catalog_mb": ("MB of catalog to send", 1.0),
    "plan_s": ("seconds to make the plan", 1.0), "fingerprint_mb": ("MB of fingerprint in a checkpoint", 1.0),
    "first_s": ("seconds to the first micro-batch", 1.0), "memory_mb": ("MB of memory", 1.0),
    "lanes_mb": ("MB of lane states in a checkpoint", 0.0),
}  # fmt: skip
PROMISED_BY_PROCESSES = {
    # With more processes than lanes, each plans what it shares a lane for, and takes its part.
    "milliseconds": ("ms of planning per update, of one process", 1.0),
    "memory_mb": ("MB of memory for planning, of one process", 0.0),
    "requests": ("S3 requests per update, of all", 1.0), "gigabytes": ("GB per update, of all", 1.0),
    "index_requests": ("S3 requests for indexes per update, of all", 2.0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 shards")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        table, *numbers = given.measure
        print(json.dumps(TABLES[table](*map(int, numbers))))
        return
    shards = [10_000, 100_000] + ([] if given.quick else [1_000_000])
    started = print_table(
        f"Start-up with a manifest; {ROWS_PER_SHARD:,} rows per shard",
        START_UP, ({"shards": number} | measure("start_up", number) for number in shards),
    )  # fmt: skip
    planned = print_table(
        f"Planning of one process; {PLANNED_SHARDS:,} shards, an update is {MICRO_BATCH_SIZE} samples on each process",
        PLANNING, ({"processes": number} | measure("planning", PLANNED_SHARDS, number) for number in PROCESSES),
    )  # fmt: skip
    print_table(
        f"Shuffling; an update is {UPDATE_SAMPLES:,} samples of 1,000 shards",
        SHUFFLING, ({"lanes": lanes, "rows": rows} | measure("shuffling", lanes, rows) for lanes, rows in GROUPS),
    )  # fmt: skip
    print_table(
        "Growth: 1 is in proportion, 0 is none",
        GROWTH,
        (*growth(started, "shards", PROMISED_BY_SHARDS), *growth(planned, "processes", PROMISED_BY_PROCESSES)),
    )


if __name__ == "__main__":
    main()
