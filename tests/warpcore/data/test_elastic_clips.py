"""Clips, pictures and both in one run are read alike by any number of processes, and where a run goes on."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from tests.warpcore.data.clips import clip
from tests.warpcore.data.tars import catalog_of, picture, write_tar
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.clip_buckets import ClipBuckets, Rung
from warpcore.data.plan import Plan
from warpcore.data.reader import Batch, Reader

TXT = CaptionGetter.parse(["txt", "identity"])
VIDEOS = (("mp4", "h264"), ("mov", "hevc"), ("webm", "vp9"), ("ts", "h264 ts"))
PICTURES = 16
STOP, COUNT = 7, 20


def bitten(data: bytes) -> bytes:
    """A video whose header is whole, and whose frames are not."""
    start = data.index(b"mdat") + 100
    return data[:start] + bytes(len(data) // 2) + data[start + len(data) // 2 :]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    members = []
    for number in range(5 * len(VIDEOS)):
        extension, kind = VIDEOS[number % len(VIDEOS)]
        video = clip(kind, num_frames=60 if number % 3 else 24)  # the shorter ones have no 17 frames at 12 per second
        members += [(f"v{number}.{extension}", video), (f"v{number}.txt", b"a video")]
    members += [("bad.mp4", bitten(clip("h264"))), ("bad.txt", b"a damaged video")]
    members += [("short.mp4", clip("h264", num_frames=4)), ("short.txt", b"a short video")]
    for number in range(PICTURES):
        members += [(f"p{number}.jpg", picture(160, 96)), (f"p{number}.txt", b"a picture")]
    members += [("torn.jpg", picture(160, 96)[:-300]), ("torn.txt", b"a damaged picture")]
    half = len(members) // 2
    return catalog_of(write_tar(folder / "a.tar", members[:half]), write_tar(folder / "b.tar", members[half:]))


def rungs(*lengths: tuple[int, int]) -> list[Rung]:
    """Of (frames, micro-batch size)."""
    return [
        Rung("64px", frames, Buckets(64 * 64, 8, [5 / 3]), 64 * 64, micro_batch_size=size) for frames, size in lengths
    ]


RUNS = {
    "pictures": ClipBuckets(rungs((1, 3))),
    "clips": ClipBuckets(rungs((9, 2)), stride=2),
    "clips and pictures in micro-batches of unequal size": ClipBuckets(rungs((17, 1), (9, 2), (1, 4)), frame_rate=12),
}


def batches(plan: Plan, buckets: ClipBuckets, **position) -> Iterator[Batch]:
    reader = Reader(captions=TXT, crop="random", frame_stride=buckets.stride, frame_rate=buckets.frame_rate)
    return map(reader.__getitems__, plan.micro_batches(**position))


def same(one: Batch, other: Batch) -> bool:
    values = [(b.number, b.size, b.lane, b.state, b.keys, b.seeds, b.events, b.weight) for b in (one, other)]
    return (
        values[0] == values[1]
        and torch.equal(one.images, other.images)
        and torch.equal(one.columns["fps"], other.columns["fps"])
    )


@pytest.mark.parametrize("kind", RUNS)
def test_any_number_of_processes_reads_the_same_samples_and_goes_on_where_another_number_stopped(catalog, kind):
    plan = Plan(catalog, micro_batch_size=None, buckets=RUNS[kind], captions=TXT, num_lanes=2, seed=5)
    whole = list(islice(batches(plan, RUNS[kind]), COUNT))
    drawn = {key for batch in whole for key in batch.keys}
    assert any(key.startswith("v") for key in drawn) == (kind != "pictures")
    assert any(key.startswith("p") for key in drawn) == (kind != "clips")
    assert "short" not in drawn
    bad = {event.source.rpartition("/")[2] for batch in whole for event in batch.events}
    assert bad
    assert bad <= {"pictures": {"torn.jpg"}, "clips": {"bad.mp4"}}.get(kind, {"torn.jpg", "bad.mp4"})
    for num_processes in (1, 2, 4):
        ranks = [batches(plan, RUNS[kind], rank=rank, num_processes=num_processes) for rank in range(num_processes)]
        found = [batch for rank in ranks for batch in islice(rank, COUNT // num_processes)]
        assert all(same(batch, whole[batch.number]) for batch in found)
    if "unequal" in kind:
        assert len({len(batch.keys) for batch in whole}) == 3
    states = {batch.lane: batch.state for batch in whole[:STOP]}
    for num_processes in (1, 2, 4):
        position = {"num_processes": num_processes, "start": STOP, "lane_states": states}
        for rank in range(num_processes):
            after = list(islice(batches(plan, RUNS[kind], rank=rank, **position), 2))
            assert all(same(batch, whole[batch.number]) for batch in after)
