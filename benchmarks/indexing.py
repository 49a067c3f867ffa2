"""Indexing speed: samples per second and processor time per sample of `index_shard`, on tars on the local disk.

    python3 benchmarks/indexing.py [--samples 1000] [--repeats 5]

The tars hold pictures (JPEG), captions and .json of a usual size. With PYTHONPATH at another checkout the same script
measures that one: run the two in turn to compare them.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from warpcore.data.index import index_shard
from warpcore.data.shards import resolve_sources

NUM_SHARDS = 4


def write_tar(path: Path, samples: int, rng: np.random.Generator) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            picture = io.BytesIO()
            pixels = rng.integers(0, 256, (160, 160 + number % 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "JPEG", quality=90)
            members = {
                "jpg": picture.getvalue(),
                "txt": b"a caption of some forty letters, number %d" % number,
                "json": b'{"score": %d, "source": "camera"}' % number,
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{path.stem}_{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="of each of the four tars")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    walls, processor = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        data = Path(folder, "data")
        data.mkdir()
        rng = np.random.default_rng(0)
        for number in range(NUM_SHARDS):
            write_tar(data / f"{number}.tar", given.samples, rng)
        shards = [shard for source in resolve_sources(str(data)) for shard in source.shards]
        for _ in range(given.repeats):
            for index in data.glob("*.parquet"):
                index.unlink()
            began, busy = time.perf_counter(), time.process_time()
            for shard in shards:
                index_shard(shard)
            walls.append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
    count = NUM_SHARDS * given.samples
    wall, busy = statistics.median(walls), statistics.median(processor)
    print("| samples | samples/s | processor microseconds per sample |\n|---|---|---|")
    print(f"| {count} | {count / wall:.0f} | {1e6 * busy / count:.0f} |")


if __name__ == "__main__":
    main()
