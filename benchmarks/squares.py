"""Pictures to squares: the loader beside SPDL, see `benchmarks/data.py`."""

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import open_catalog
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError

SIDE, MICRO_BATCH_SIZE = 768, 8
RATIOS = (1, 3 / 2, 2 / 3, 4 / 3, 3 / 4, 16 / 9, 9 / 16)
"""Width to height, of cameras."""
LEAST_PIXELS, MOST_PIXELS = 0.5e6, 4e6


class Measured(NamedTuple):
    per_second: float
    """Samples."""
    milliseconds: float
    """Of processors per sample, of all processes and threads together."""
    mebibytes: float
    """The most memory seen after a batch; what processes share counts once."""


@contextmanager
def opened(paths: list[str], num_workers: int, buckets: Buckets) -> Iterator[Loader]:
    """The loader over the plan of tars."""
    captions = CaptionGetter.parse(["txt", "identity"])
    catalog = open_catalog(resolve_sources(paths))
    plan = Plan(catalog, micro_batch_size=MICRO_BATCH_SIZE, buckets=buckets, captions=captions)
    with Loader(plan.micro_batches(), Reader(captions=captions), num_workers=num_workers) as loader:
        yield loader


@contextmanager
def ours(paths: list[str], num_workers: int) -> Iterator[Iterator[np.ndarray]]:
    """Batches uint8 (B, H, W, 3), by worker processes."""
    with opened(paths, num_workers, Buckets.for_image_size(SIDE)) as loader:
        yield (batch.images.permute(0, 2, 3, 1).numpy() for batch in loader)


@contextmanager
def spdl(paths: list[str], num_workers: int) -> Iterator[Iterator[np.ndarray]]:
    """The same by SPDL's threads: FFmpeg decodes, resizes and crops; captions are left out."""
    from spdl import io
    from spdl.pipeline import PipelineBuilder

    steps = io.get_video_filter_desc(
        scale_width=SIDE, scale_height=SIDE, scale_algo="bilinear", scale_mode="crop", pix_fmt="rgb24"
    )

    def pictures() -> Iterator[bytes]:
        for path in itertools.cycle(paths):
            for name, content in io.iter_tarfile(Path(path).read_bytes()):
                if name.endswith(".jpg"):
                    yield bytes(content)

    def decode(content: bytes) -> Any:
        return io.decode_packets(io.demux_image(content), filter_desc=steps)

    decode(next(pictures()))  # fails here where FFmpeg's libraries are missing; in the pipeline's threads that hangs
    pipeline = (
        PipelineBuilder()
        .add_source(pictures())
        .pipe(decode, concurrency=num_workers)
        .aggregate(MICRO_BATCH_SIZE)
        .pipe(io.convert_frames)
        .add_sink(2)
        .build(num_threads=num_workers)
    )
    with pipeline.auto_stop():
        yield (io.to_numpy(buffer) for buffer in pipeline)


def compare(paths: list[str], num_workers: int, repeats: int, seconds: float) -> None:
    """Print a table of both, as medians of interleaved runs."""
    contenders: dict[str, Callable] = {"loader": ours}
    if find_spec("spdl") is not None and find_spec("spdl.io") is not None:
        contenders["SPDL"] = spdl
    else:
        print("SPDL is not installed (pip install spdl-core spdl-io; it also needs FFmpeg's libraries): left out\n")
    runs = [
        {name: measured(contender, paths, num_workers, seconds) for name, contender in contenders.items()}
        for _ in range(repeats)
    ]
    print(f"| {num_workers} workers | samples/s | CPU ms per sample | MiB |\n|---|---|---|---|")
    for name in contenders:
        rate, milliseconds, mebibytes = (statistics.median(run[name][i] for run in runs) for i in range(3))
        print(f"| {name} | {rate:.1f} | {milliseconds:.2f} | {mebibytes:.0f} |")
    if "SPDL" in contenders:
        faster = statistics.median(run["loader"].per_second / run["SPDL"].per_second for run in runs)
        less = statistics.median(run["SPDL"].milliseconds / run["loader"].milliseconds for run in runs)
        print(
            f"\nThe loader gives {faster:.2f}x as many samples per second as SPDL, {less:.2f}x as many per CPU second."
        )


def measured(contender: Callable, paths: list[str], num_workers: int, seconds: float) -> Measured:
    """Run a contender in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(contender, paths, num_workers, seconds, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise UserError("a contender ended without a result; its own message stands above") from None
    finally:
        process.join()


def _measure(contender: Callable, paths: list[str], num_workers: int, seconds: float, sender: Any) -> None:
    torch.set_num_threads(1)
    with contender(paths, num_workers) as batches:
        for _ in itertools.islice(batches, 3 * num_workers):  # read ahead while the workers started
            pass
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        spent, memory, number, began = _spent(processes), 0, 0, time.perf_counter()
        for batch in batches:
            number += len(batch)
            if (elapsed := time.perf_counter() - began) > seconds:
                break
        spent = _spent(processes) - spent
        for _ in itertools.islice(batches, 8):
            memory = max(memory, sum(process.memory_full_info().pss for process in processes))
    sender.send(Measured(number / elapsed, spent / number * 1000, memory / 2**20))


def _spent(processes: list[psutil.Process]) -> float:
    """Seconds of processors."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)
