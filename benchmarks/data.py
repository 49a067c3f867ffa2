"""Data speed: samples per second of the loader, beside what the hardware allows and what a plain pipeline reaches.

    python3 benchmarks/data.py [--video | --squares] [--quick]

With --video clips of videos are decoded instead, see `benchmarks/video.py`. With --squares the loader runs beside SPDL
alone: JPEGs of 0.5 to 4 MP in the shapes of cameras become squares of 768 px, cropped from the middle, by two workers
each; CPU time and memory are of all processes together (needs `pip install spdl-core spdl-io psutil`). Of pictures:

Prints Markdown tables. All contenders run in turn, several times over, on the same synthetic photographs (JPEG quality
90, 12 aspect ratios) and the same number of worker processes; figures are medians over the repeats.

- limit: decode + one resize of pictures in memory, in a bare loop, in as many processes as there are workers
- loader: `warpcore.data.Loader` over the `Plan` of a folder of tars, to batches of uint8
- plain: webdataset + torchvision; workers make float tensors of whole pictures, the main process resizes them
"""

import argparse
import io
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks import squares, video
from warpcore.data.buckets import Buckets, resized_size
from warpcore.data.images import decode

RATIOS = ["1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16"]
IMAGE_SIZE, MICRO_BATCH_SIZE, NUM_SHARDS = 768, squares.MICRO_BATCH_SIZE, 4
BUCKETS = Buckets.for_image_size(IMAGE_SIZE, RATIOS)


def photograph(rng: np.random.Generator, pixels: float, ratio: float) -> bytes:
    """A JPEG with what decoders meet in photographs: smooth light, edges, texture of every scale, noise."""
    height, width = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
    picture = np.full((height, width, 3), 128, np.float32)
    cells, contrast = 3, 55.0
    while cells < max(height, width) / 2:
        shape = (max(2, height * cells // width), cells, 3)
        picture += contrast * cv2.resize(rng.standard_normal(shape, np.float32), (width, height))
        cells, contrast = cells * 2, contrast * 0.6
    for _ in range(30):
        center = (int(rng.integers(width)), int(rng.integers(height)))
        axes = tuple(int(side) for side in rng.integers(4, max(height, width) // 8, 2))
        shade = tuple(float(value) for value in rng.integers(0, 256, 3))
        cv2.ellipse(picture, center, axes, float(rng.integers(180)), 0, 360, shade, -1)
    picture += 4 * rng.standard_normal((height, width, 1), np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def photographs(
    number: int, least_pixels: float, most_pixels: float, ratios: Sequence[float] = BUCKETS.ratios
) -> list[bytes]:
    """Ratios in turn, areas spread evenly between the two."""
    rng = np.random.default_rng(0)
    areas = rng.permutation(np.linspace(least_pixels, most_pixels, number))
    return [photograph(rng, area, ratio) for area, ratio in zip(areas, cycle(ratios), strict=False)]


def write_tars(pictures: list[bytes], folder: Path) -> list[str]:
    paths = [folder / f"{number:05}.tar" for number in range(NUM_SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for key, picture in list(enumerate(pictures))[number::NUM_SHARDS]:
                for extension, data in (("jpg", picture), ("txt", f"a photograph, number {key}".encode())):
                    entry = tarfile.TarInfo(f"{key:06}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return [str(path) for path in paths]


def bucket_of(data: bytes) -> tuple[int, int]:
    return BUCKETS.choose(*Image.open(io.BytesIO(data)).size, seed=0)


# Contenders


def whole(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode all pixels, resize once."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    tensor = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    resized = resized_size(*pixels.shape[:2], size)
    return F.interpolate(tensor, resized, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def scaled(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The loader's own decoding: DCT-scaled where that is at least 2x."""
    return decode(data, size).pixels


def limit(read: Callable, pictures: list[bytes], num_workers: int, seconds: float) -> float:
    """Samples per second of `read` in bare loops."""
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(num_workers), context.Queue()
    processes = [
        context.Process(target=_bare_loop, args=(read, pictures[number::num_workers], seconds, barrier, counts))
        for number in range(num_workers)
    ]
    for process in processes:
        process.start()
    rate = sum(counts.get() for _ in processes)
    for process in processes:
        process.join()
    return rate


def _bare_loop(read: Callable, pictures: list[bytes], seconds: float, barrier, rates) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    jobs = [(picture, bucket_of(picture)) for picture in pictures]
    for job in jobs[:4]:
        read(*job)
    barrier.wait()
    number, began = 0, time.perf_counter()
    for job in cycle(jobs):
        read(*job)
        number += 1
        if time.perf_counter() - began > seconds:
            break
    rates.put(number / (time.perf_counter() - began))


def loader(paths: list[str], num_workers: int, seconds: float) -> float:
    """Samples per second of the loader over the plan."""
    with squares.opened(paths, num_workers, BUCKETS) as batches:
        return rate((len(batch.keys) for batch in batches), 3 * num_workers, seconds)


def plain(paths: list[str], num_workers: int, seconds: float) -> float:
    """Samples per second of webdataset + torchvision, as the reference implementation puts them together."""
    import webdataset

    samples = (
        webdataset.WebDataset(paths, resampled=True, shardshuffle=False).decode("torchrgb").to_tuple("jpg", "txt")
    )
    workers = torch.utils.data.DataLoader(
        samples, batch_size=MICRO_BATCH_SIZE, num_workers=num_workers, collate_fn=list
    )
    return rate(map(len, bucketed(workers)), 2, seconds)


def bucketed(groups: Iterable[list[tuple[torch.Tensor, str]]]) -> Iterator[torch.Tensor]:
    from torchvision.transforms import functional as vision

    waiting: dict[tuple[int, int], list[torch.Tensor]] = {}
    for group in groups:
        for picture, _ in group:
            size = BUCKETS.choose(picture.shape[2], picture.shape[1], seed=0)
            picture = vision.resize(picture, list(resized_size(*picture.shape[1:], size)), antialias=True)
            waiting.setdefault(size, []).append(vision.center_crop(picture, list(size)))
            if len(waiting[size]) == MICRO_BATCH_SIZE:
                yield torch.stack(waiting.pop(size))


def rate(batch_sizes: Iterator[int], num_warm_up: int, seconds: float) -> float:
    """Samples per second after the first batches, which were read ahead while the workers started."""
    for _ in islice(batch_sizes, num_warm_up):
        pass
    number, began = 0, time.perf_counter()
    for batch_size in batch_sizes:
        number += batch_size
        if time.perf_counter() - began > seconds:
            break
    return number / (time.perf_counter() - began)


# Report


def compare(pictures: list[bytes], repeats: int, seconds: float, with_plain: bool) -> None:
    """Print a table of every contender with 1 and 2 workers, as medians of interleaved runs."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_tars(pictures, Path(folder))
        contenders = {
            "limit, all pixels decoded": lambda *args: limit(whole, pictures, *args),
            "limit, DCT-scaled decoding": lambda *args: limit(scaled, pictures, *args),
            "loader": lambda *args: loader(paths, *args),
        }
        if with_plain:
            contenders["plain webdataset + torchvision"] = lambda *args: plain(paths, *args)
        columns = []
        for num_workers in (1, 2):
            runs = [{name: run(num_workers, seconds) for name, run in contenders.items()} for _ in range(repeats)]
            columns.append({name: statistics.median(run[name] for run in runs) for name in contenders})
            shares = {name: [run["loader"] / run[name] for run in runs] for name in contenders}
            columns.append({name: statistics.median(shares[name]) for name in contenders})
    print("| samples/s | 1 worker | loader / this | 2 workers | loader / this |\n|---|---|---|---|---|")
    for name in contenders:
        one, share_one, two, share_two = (column[name] for column in columns)
        print(f"| {name} | {one:.1f} | {share_one:.0%} | {two:.1f} | {share_two:.0%} |")


def beside_spdl(quick: bool, repeats: int, seconds: float) -> None:
    pictures = photographs(28 if quick else 84, squares.LEAST_PIXELS, squares.MOST_PIXELS, squares.RATIOS)
    print(f"\n0.5 to 4 MP: {len(pictures)} photographs, squares of {squares.SIDE} px\n")
    with tempfile.TemporaryDirectory() as folder:
        # One run's ratio scatters by 5%.
        squares.compare(write_tars(pictures, Path(folder)), num_workers=2, repeats=3 * repeats, seconds=seconds)


def fidelity(pictures: list[bytes]) -> str:
    """PSNR of DCT-scaled against whole decoding, both resized to the bucket."""
    values = []
    for data in pictures:
        result = decode(data, bucket_of(data))
        file = io.BytesIO()
        Image.open(io.BytesIO(data)).save(file, "BMP")  # no DCT to scale: all pixels
        error = result.pixels.astype(float) - decode(file.getvalue(), bucket_of(data)).pixels
        if (error**2).mean() > 0.1:  # rounding alone gives less: this one was not scaled
            values.append(10 * np.log10(255**2 / (error**2).mean()))
    if not values:
        return "no picture was large enough to be decoded at half its size"
    scaled_count = f"{len(values)} of {len(pictures)} pictures are decoded DCT-scaled"
    return f"{scaled_count}; PSNR to decoding all pixels: median {np.median(values):.1f}, least {min(values):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, one short run of each")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--video", action="store_true", help="clips of videos, in place of pictures")
    only.add_argument("--squares", action="store_true", help="the loader beside SPDL alone")
    options = parser.parse_args()
    quick = options.quick
    if options.video:
        video.compare(quick)
        return
    repeats, seconds = (1, 2.0) if quick else (5, 4.0)
    if options.squares:
        beside_spdl(quick, repeats, seconds)
        return
    for title, number, least, most in (("0.8 to 4 MP", 96, 0.8e6, 4e6), ("12 MP", 24, 12e6, 12e6)):
        pictures = photographs(number // 4 if quick else number, least, most)
        mean_bits = statistics.mean(len(picture) * 8 for picture in pictures) / ((least + most) / 2)
        print(f"\n{title}: {len(pictures)} photographs, {mean_bits:.1f} bit per pixel, buckets of {IMAGE_SIZE}² px\n")
        compare(pictures, repeats, seconds, with_plain=most < 12e6)  # it needs minutes for a few of those
        print(f"\n{fidelity(pictures)}")
    beside_spdl(quick, repeats, seconds)


if __name__ == "__main__":
    main()
