"""Decoding of videos: clips per CPU second, beside what a decoder allows and what other readers reach.

    python3 benchmarks/data.py --video [--quick]

All contenders take the same frames, at stride 2 from a drawn beginning, of the same file in memory, resized to a
shorter side of 256 px, in turn and in shuffled order. CPU seconds are those of all threads of the process; figures are
medians. Videos are made up once, and kept in demo/benchmark_videos: 8 s with texture, pans, zooms, discs that hide one
another, and grain; key frames where the encoder wants them, 250 frames apart at most.

- limit: what the frames depend on is decoded, bare, and each is resized once; which packets these are is known before
- ours: `warpcore.data.videos.decode`
- PyAV: seeks to the key frame, decodes on to the last frame, and resizes with swscale
- torchcodec, decord: where they are installed
"""

import io
import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import cv2
import numpy as np

from warpcore.data.buckets import resized_size
from warpcore.data.frames import choose_frames
from warpcore.data.video_references import without_unused
from warpcore.data.videos import decode
from warpcore.errors import UserError
from warpcore.files import write_whole

FOLDER = Path("demo/benchmark_videos")
FPS, SECONDS, STRIDE, SHORT_SIDE = 30, 8, 2, 256
SIZES = {"480p": (480, 854), "1080p": (1080, 1920)}
ENCODERS = {
    "h264": ("libx264", {"preset": "medium"}, {"480p": 1_500_000, "1080p": 6_000_000}),
    "hevc": ("libx265", {"preset": "fast", "x265-params": "log-level=none"}, {"480p": 1_000_000, "1080p": 4_000_000}),
}
LENGTHS = (17, 33)
LEAST_SHARE, LEAST_OF_A_CELL, LEAST_GAIN = 0.85, 0.75, 1.3
"""Targets: of the limit as geometric mean, in each cell, and beside PyAV with seek."""
BT601 = 6  # as ITU-T H.273 numbers it
SAME_FRAME = 6.0
"""Mean difference, in 1/255, to frames that were resized in another way; other frames differ by more."""


class Cell(NamedTuple):
    codec: str
    size: str
    num_frames: int


# Videos


def film(num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames uint8 (H, W, 3)."""
    rng = np.random.default_rng(0)
    scene = np.full((height * 3 // 2, width * 3 // 2, 3), 128, np.float32)
    cells, contrast = 4, 50.0
    while cells < height:
        noise = rng.standard_normal((cells, cells * width // height, 3), np.float32)
        scene += contrast * cv2.resize(noise, scene.shape[1::-1])
        cells, contrast = cells * 2, contrast * 0.65
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    discs = [
        (rng.uniform(0.05, 0.15), rng.uniform(0, 2 * np.pi, 2), rng.integers(0, 256, 3).tolist()) for _ in range(6)
    ]
    for number in range(num_frames):
        zoom, shift = 1 + 0.2 * np.sin(number / 50), 0.2 * np.array([np.sin(number / 37), np.cos(number / 61)])
        matrix = np.array([[zoom, 0, -width * (0.25 + shift[0])], [0, zoom, -height * (0.25 + shift[1])]])
        frame = cv2.warpAffine(scene, matrix, (width, height))
        for radius, phase, colour in discs:
            x, y = 0.5 + 0.4 * np.sin(number / 30 + phase)
            cv2.circle(frame, (int(x * width), int(y * height)), int(radius * height), colour, -1)
        grain = rng.integers(-6, 7, (height, width, 1), np.int16)
        yield np.clip(frame + grain, 0, 255).astype(np.uint8)


def video(codec: str, size: str, seconds: int = SECONDS) -> bytes:
    """A made-up video, from the folder where it is there already."""
    import av

    path = FOLDER / f"{codec}_{size}_{seconds}s.mp4"
    if not path.exists():
        print(f"making {path} ...", flush=True)
        encoder, options, bits = ENCODERS[codec]
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream(encoder, rate=FPS, options=options)
            stream.height, stream.width, stream.pix_fmt = *SIZES[size], "yuv420p"
            stream.bit_rate, stream.codec_context.gop_size = bits[size], 250
            stream.codec_context.colorspace = BT601  # readers differ in what they take untagged videos for
            for pixels in film(seconds * FPS, *SIZES[size]):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode(None))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, file.getvalue())
    return path.read_bytes()


# Contenders: (data, frames, (H, W)) -> a function to be timed, which gives the frames (T, H, W, 3)

Contender = Callable[[bytes, Sequence[int], tuple[int, int]], Callable[[], Any]]


def limit(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> Callable[[], Any]:
    import av
    from av.video.reformatter import VideoReformatter

    packets, times, like = needed_packets(data, frames)

    def run() -> np.ndarray:
        context, found, reformatter = av.CodecContext.create(like.name, "r"), {}, VideoReformatter()
        context.extradata, context.thread_count = like.extradata, 1
        for packet in (*packets, None):
            for frame in context.decode(packet):
                if frame.pts in times:
                    planes = reformatter.reformat(frame, size[1], size[0], "gbrp", threads=1)
                    found[frame.pts] = planes.to_ndarray(format="gbrp")
        return np.stack([found[time] for time in times])

    return run


def needed_packets(data: bytes, frames: Sequence[int]) -> tuple[list[Any], list[int], Any]:
    """What the frames depend on, their times, and PyAV's context of the decoder."""
    import av

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = sorted(packet.pts for packet in packets)
        times = [shown[number] for number in frames]
        places = [place for place, packet in enumerate(packets) if packet.pts in times]
        start = max(n for n in range(places[0] + 1) if packets[n].is_keyframe and packets[n].pts <= times[0])
        packets = packets[start : places[-1] + 1]
        is_wanted = [packet.pts in times for packet in packets]
        return list(without_unused(packets, is_wanted, stream.codec_context)), times, stream.codec_context


def ours(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> Callable[[], Any]:
    return lambda: decode(data, frames, size).pixels


def pyav(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> Callable[[], Any]:
    import av
    from av.video.reformatter import VideoReformatter

    def run() -> np.ndarray:
        found, reformatter = [], VideoReformatter()
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            ticks = int(1 / (FPS * stream.time_base))
            wanted = {(stream.start_time or 0) + number * ticks for number in frames}
            container.seek(min(wanted), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    scaled = reformatter.reformat(frame, size[1], size[0], "rgb24", threads=1)
                    found.append(scaled.to_ndarray())
                if len(found) == len(frames):
                    return np.stack(found)
        raise RuntimeError("PyAV found fewer frames")

    return run


def torchcodec(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> Callable[[], Any]:
    from torch.nn.functional import interpolate
    from torchcodec.decoders import VideoDecoder

    def run() -> np.ndarray:
        pixels = VideoDecoder(data, num_ffmpeg_threads=1).get_frames_at(list(frames)).data
        return interpolate(pixels, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()

    return run


def decord(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> Callable[[], Any]:
    from decord import VideoReader

    def run() -> np.ndarray:
        reader = VideoReader(io.BytesIO(data), width=size[1], height=size[0], num_threads=1)
        return reader.get_batch(list(frames)).asnumpy()

    return run


CONTENDERS: dict[str, Contender] = {
    "limit": limit, "ours": ours, "PyAV with seek": pyav, "torchcodec": torchcodec, "decord": decord,
}  # fmt: skip


# Report


def compare(quick: bool) -> None:
    """Print a table of every contender, and the memory of a worker."""
    sizes, lengths, rounds, seconds = (("480p",), (9,), 2, 3) if quick else (tuple(SIZES), LENGTHS, 7, SECONDS)
    cells = [Cell(codec, size, frames) for codec in ENCODERS for size in sizes for frames in lengths]
    names = list(_installed(video("h264", "480p", seconds)))
    rates: dict[Cell, dict[str, float]] = {}
    titles = ("clips per CPU second", *names, "ours / limit", "ours / PyAV")
    print(f"\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for cell in cells:
        rates[cell] = _rates(cell, video(cell.codec, cell.size, seconds), seconds, names, rounds)
        found = rates[cell]
        columns = " | ".join(f"{found[name]:.1f}" for name in names)
        gains = f"{found['ours'] / found['limit']:.0%} | {found['ours'] / found['PyAV with seek']:.2f}x"
        print(f"| {cell.codec} {cell.size}, {cell.num_frames} frames | {columns} | {gains} |", flush=True)
    shares = [found["ours"] / found["limit"] for found in rates.values()]
    mean, least = prod(shares) ** (1 / len(shares)), min(shares)
    print(f"\nof the limit: {mean:.0%} as geometric mean (target {LEAST_SHARE:.0%}), at least {least:.0%} "
          f"(target {LEAST_OF_A_CELL:.0%})")  # fmt: skip
    for name in names[2:]:
        gain = prod(found["ours"] / found[name] for found in rates.values()) ** (1 / len(rates))
        target = f" (target {LEAST_GAIN:.1f}x)" if name == "PyAV with seek" else ""
        print(f"beside {name}: {gain:.2f}x{target}")
    size, length, minutes = ("480p", 9, 1 / 20) if quick else ("1080p", 33, 1)
    print(f"\n{_memory(size, length, round(60 * minutes))}")


def _installed(data: bytes) -> Iterator[str]:
    for name, contender in CONTENDERS.items():
        try:
            contender(data, [0, 2], (64, 64))()
            yield name
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name} is left out: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}")


def _rates(cell: Cell, data: bytes, seconds: int, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Clips per CPU second of every contender."""
    size = resized_size(*SIZES[cell.size], (SHORT_SIDE, SHORT_SIDE))
    spent: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    for number in range(rounds + 1):  # the first one warms up
        frames = choose_frames(seconds * FPS, FPS, cell.num_frames, stride=STRIDE, seed=number)
        expected = ours(data, frames, size)().astype(np.int16)
        for name in shuffled.sample(list(names), len(names)):
            run = CONTENDERS[name](data, frames, size)
            began = time.process_time()
            found = run()
            took = time.process_time() - began
            if number:
                spent[name].append(took)
            elif name != "limit" and np.abs(found - expected).mean(axis=(1, 2, 3)).max() > SAME_FRAME:
                print(f"{name} gives other frames of {cell.codec} {cell.size}")
    return {name: 1 / statistics.median(times) for name, times in spent.items()}


def _memory(size: str, length: int, seconds: int) -> str:
    """Of a process that reads one video time and again."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    data = video("h264", size, seconds)
    process = context.Process(target=_read_again, args=(data, size, length, seconds, queue))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.1)
    try:
        before, after = queue.get(timeout=1)
    except Empty:
        raise UserError(f"the process that reads clips ended too early (exit code {process.exitcode})") from None
    process.join()
    return (
        f"memory of a worker that reads 20 clips of {length} frames of a {size} video of {seconds} s "
        f"({len(data) / 1e6:.0f} MB): {after:.0f} MB at its peak, {after - before:.0f} MB above what it held before"
    )


def _read_again(data: bytes, size: str, length: int, seconds: int, queue: Any) -> None:
    import av  # noqa: F401

    target = resized_size(*SIZES[size], (SHORT_SIDE, SHORT_SIDE))
    before = _megabytes("VmRSS")
    for seed in range(20):
        decode(data, choose_frames(seconds * FPS, FPS, length, stride=STRIDE, seed=seed), target)
    queue.put((before, _megabytes("VmHWM")))


def _megabytes(what: str) -> float:
    """Memory of this process: VmRSS, what it holds, or VmHWM, the most that it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1000
