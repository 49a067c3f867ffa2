"""Reading from S3 through a network that fails: is a sample lost, doubled or replaced, and what does it cost?

    python3 benchmarks/faults.py [--share 0.2] [--seed 0]

The endpoint is on this machine; a proxy before it treats a share of the requests badly, in turn: connection reset in
the middle of the body, truncated body, slow trickle, 503, and an answer that is half as long as asked for. The same
micro-batches are read with and without; their keys and pixels are compared, and the time they took.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.data import BUCKETS, MICRO_BATCH_SIZE, photographs, write_tars
from benchmarks.s3 import CAPTIONS, KEY, SECRET, files_command, running
from warpcore.data import s3_requests
from warpcore.data.catalog import open_catalog
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.data.shards import resolve_sources

sys.path.append(str(Path(__file__).parents[1]))  # the proxy is one of the tests' servers
from tests.faulty_proxy import FaultyProxy

NUM_PICTURES, MICRO_BATCHES = 24, 100


def read(endpoint: str) -> tuple[float, list[tuple[tuple[str, ...], str]]]:
    """Samples per second, and (keys, hash of the pixels) of each micro-batch, of two epochs and more."""
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint}
    s3_requests._BUCKETS.clear()  # they know the endpoint of before
    catalog = open_catalog(resolve_sources("s3://files"))
    plan = Plan(catalog, micro_batch_size=MICRO_BATCH_SIZE, buckets=BUCKETS, captions=CAPTIONS)
    found = []
    with Loader(plan.micro_batches(), Reader(captions=CAPTIONS), num_workers=1) as loader:
        batches = iter(loader)
        began = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            batch = next(batches)
            pixels = hashlib.blake2b(batch.images.numpy().tobytes(), digest_size=8).hexdigest()
            found.append((tuple(batch.keys), pixels))
        seconds = time.perf_counter() - began
    return MICRO_BATCHES * MICRO_BATCH_SIZE / seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "files").mkdir()
        write_tars(photographs(NUM_PICTURES, 0.8e6, 4e6), Path(name) / "files")
        print("| requests that fail | samples/s | requests | faults met | micro-batches like those without |")
        print("|---|---|---|---|---|")
        whole = None
        with running(partial(files_command, Path(name))) as endpoint:
            for share in (0.0, given.share):
                with FaultyProxy(endpoint, share=share, seed=given.seed) as proxy:
                    speed, found = read(proxy.url)
                whole = whole or found
                alike = sum(one == other for one, other in zip(found, whole, strict=True))
                faults = ", ".join(f"{number} {kind}" for kind, number in proxy.met.items()) or "none"
                print(
                    f"| {share:.0%} | {speed:.1f} | {proxy.num_requests} | {faults} | {alike} of {len(whole)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
