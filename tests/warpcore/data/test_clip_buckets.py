"""Buckets of clips against the reference implementation's sizes and choices, and their own chances."""

import numpy as np
import pytest

from tests.golden import load_case
from warpcore.data.buckets import Buckets
from warpcore.data.clip_buckets import ClipBuckets, Rung, checked, rungs_of
from warpcore.data.resolutions import RESOLUTIONS
from warpcore.errors import UserError

GOLDEN = load_case("opensora/buckets")[0]["configs"]
BATCHES = load_case("opensora/bucket_batches")[0]
ON_ONE_PROCESS = [call for call in BATCHES["calls"] if call["processes"] == 1]
"""With more, the reference cuts an epoch so that all have as many batches, or gives one an empty batch."""
NAMES = load_case("opensora/aspect_ratios")[0]["resolutions"]


def rungs(config: dict, factor: int = 1, ratios=()) -> list[Rung]:
    return rungs_of({name: {int(n): entry for n, entry in of.items()} for name, of in config.items()}, factor, ratios)


def choose(buckets: ClipBuckets, width, height, num_frames, fps=24.0, seeds=range(1)) -> list:
    """The bucket of a sample for each of the seeds."""
    count = len(seeds)
    columns = [np.full(count, value) for value in (width, height, num_frames, fps)]
    places = buckets.choose_many(*columns[:2], np.array(seeds, np.uint64), *columns[2:])
    return [None if place < 0 else buckets.sizes[place] for place in places]


def why(buckets: ClipBuckets, width, height, num_frames, fps=24.0) -> str | None:
    """The reason why a sample never has a bucket."""
    (reason,) = buckets.misfits(*(np.array([value]) for value in (width, height, num_frames, fps)))
    return None if reason < 0 else buckets.reasons[reason]


class WithRecordedDraws(ClipBuckets):
    """Draws what the reference did: from a generator that is seeded anew for each rung."""

    def draw(self, seeds, number, what):
        generators = [np.random.default_rng(int(seed) + number) for seed in seeds]
        if what == "keep" and self.rungs[number].take is not None:
            for generator in generators:
                generator.random()
        return np.array([generator.random() for generator in generators])


@pytest.mark.parametrize("name", GOLDEN)
def test_samples_go_where_the_reference_puts_them(name):
    golden, found = GOLDEN[name], set()
    for sample in golden["samples"]:
        interval, frames = sample["frame_interval"], sample["frames"]
        buckets = WithRecordedDraws(rungs(golden["bucket_config"]), stride=interval)
        # The reference wants more than `length * interval` frames: as many as we want of a video `interval` shorter.
        frames = frames if frames == 1 else max(frames - interval, 2)
        (size,) = choose(buckets, sample["width"], sample["height"], frames, seeds=[sample["seed"]])
        assert size == (sample["thw"] and tuple(sample["thw"])), sample
        found.add(size)
        if size is not None:
            assert buckets.micro_batch_sizes[size] == sample["batch_size"]
    assert len(found) > 5


@pytest.mark.parametrize("call", ON_ONE_PROCESS, ids=lambda call: f"epoch {call['epoch']}, {call['drop_last']}")
def test_batches_of_an_epoch_hold_what_the_reference_s_hold(call):
    """The same rows in the same buckets, in batches of the same size. The reference fills up, or drops, what is left
    of a bucket in an epoch; here it waits for the next one."""
    buckets = WithRecordedDraws(rungs(BATCHES["bucket_config"]))
    number_of_buckets = sum(len(rung.shapes.sizes) for rung in buckets.rungs)
    expected = {}
    for row, sample in enumerate(BATCHES["rows"]):
        frames = sample["num_frames"] if sample["num_frames"] == 1 else sample["num_frames"] - 1
        seed = call["seed"] + call["epoch"] + row * number_of_buckets
        (size,) = choose(buckets, sample["width"], sample["height"], frames, seeds=[seed])
        if size is not None:
            expected.setdefault(size, set()).add(row)
    found = {}
    for batch in call["batches_of_each_process"][0]:
        entries = [tuple(map(int, entry.split("-"))) for entry in batch]
        (size,) = {entry[1:] for entry in entries}
        assert len(entries) == buckets.micro_batch_sizes[size]
        found.setdefault(size, set()).update(row for row, *_ in entries)
    for size, rows in expected.items():
        assert found.get(size, set()) <= rows
        dropped = len(rows) % buckets.micro_batch_sizes[size] if call["drop_last"] else 0
        assert len(rows - found.get(size, set())) == dropped
    assert found.keys() <= expected.keys()


def test_named_resolutions_have_the_sizes_of_the_reference():
    assert RESOLUTIONS.keys() == NAMES.keys()
    for name, golden in NAMES.items():
        assert RESOLUTIONS[name].area == golden["pixels"]
        sizes = {f"{ratio:.2f}": list(size) for ratio, size in RESOLUTIONS[name].sizes.items()}
        assert sizes == golden["sizes"]


def test_each_rung_keeps_its_share_by_chance():
    config = {"512": {1: [0.25, 8]}, "240p": {16: [0.5, 4], 32: [[0.6, 0.4], 2]}, "144p": {1: [1.0, 9], 16: [0.9, 4]}}
    buckets = ClipBuckets(rungs(config))
    for num_frames, expected in ((1, {(1, 512, 512): 0.25, (1, 192, 192): 0.75}), (40, {
        (32, 320, 320): 0.24, (16, 320, 320): 0.6 * 0.5, (16, 192, 192): (1 - 0.24 - 0.3) * 0.9,
        None: (1 - 0.24 - 0.3) * 0.1,
    })):  # fmt: skip
        found = choose(buckets, 512, 512, num_frames, seeds=range(20_000))
        for size, share in expected.items():
            assert found.count(size) / len(found) == pytest.approx(share, abs=0.012)
        told = {
            str(rung): float(share[0]) for rung, share in buckets.shares(*np.array([[512], [512], [num_frames], [24]]))
        }
        counted = dict.fromkeys(told, 0.0)
        for (frames, side, _), share in ((size, share) for size, share in expected.items() if size):
            name = {512: "512", 320: "240p", 192: "144p"}[side]
            counted[f"{name} x {frames} frame{'s' * (frames > 1)}"] += share
        assert told == pytest.approx(counted)
    assert choose(buckets, 512, 512, 40, seeds=range(99)) == choose(buckets, 512, 512, 40, seeds=range(99))


def test_a_clip_that_has_just_the_frames_of_a_bucket_fills_it():
    for stride, needed in ((1, 17), (3, 49)):
        buckets = ClipBuckets(rungs({"240p": {17: [1.0, 1]}}), stride=stride)
        assert choose(buckets, 426, 240, needed) == [(17, 240, 426)]
        assert choose(buckets, 426, 240, needed - 1) == [None]
    at_8 = ClipBuckets(rungs({"240p": {17: [1.0, 1]}}), frame_rate=8)
    assert choose(at_8, 426, 240, 49, fps=24) == [(17, 240, 426)]
    assert choose(at_8, 426, 240, 48, fps=24) == [None]
    assert choose(at_8, 426, 240, 17, fps=8) == [(17, 240, 426)]


def test_a_sample_that_fits_nothing_is_told_why():
    clips = ClipBuckets(rungs({"480p": {51: [1.0, 1]}, "240p": {17: [1.0, 2], 34: [0.0, None]}}), stride=2)
    assert "one frame, for which there is no bucket" in why(clips, 4000, 4000, 1, 0)
    assert "too few frames for the shortest bucket (17 frames, frame_stride 2)" in why(clips, 4000, 4000, 32)
    assert "too small" in why(clips, 240, 240, 40)
    assert "keep nothing" in why(clips, 320, 320, 70), "a wall of 34 frames, and too small for 480p"
    assert why(clips, 320, 320, 40) is None
    assert why(clips, 900, 900, 101) is None
    pictures = ClipBuckets(rungs({"256": {1: [0.1, 4]}}))
    assert why(pictures, 4000, 4000, 200) == "a video, and all buckets are of one frame"
    assert why(pictures, 256, 256, 1, 0) is None


def test_one_length_takes_clips_of_any_size_to_the_run_s_buckets():
    shapes = Buckets(64 * 64, 8, [1, 16 / 9])
    buckets = ClipBuckets([Rung("image_size", 17, shapes)])
    assert buckets.sizes == [(17, *size) for size in dict.fromkeys(shapes.sizes)]
    assert buckets.micro_batch_sizes == {}
    for width, height in ((30, 30), (1920, 1080), (90, 160)):
        assert choose(buckets, width, height, 20) == [(17, *shapes.choose(width, height, 0))]
    assert "one frame" in why(buckets, 64, 64, 1, 0)


def test_sides_are_multiples_of_the_factor_and_ratios_may_be_given():
    sizes = ClipBuckets(rungs({"240p": {17: [1.0, 1]}}, factor=8)).sizes
    assert (17, 240, 424) in sizes
    assert all(side % 8 == 0 for _, *sides in sizes for side in sides)
    square_and_wide = ClipBuckets(rungs({"64px": {9: [1.0, 1]}, "256px": {5: [1.0, 1]}}, 16, [1.0, 2.0]))
    assert square_and_wide.sizes == [(5, *size) for size in Buckets(256**2, 16, [1, 2]).sizes] + [
        (9, *size) for size in Buckets(64**2, 16, [1, 2]).sizes
    ]
    assert ClipBuckets(rungs({"256px": {1: [1.0, 1]}})).sizes == ClipBuckets(rungs({"256": {1: [1.0, 1]}})).sizes
    assert ClipBuckets(rungs({"64px": {9: [1.0, 1]}})).sizes == [(9, 64, 64)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"240": {17: [1.0, None]}}, r"240: 17: it keeps samples, so it needs a micro-batch size"),
        ({"240p": {17: [1.0, (8, 4)]}}, r"240p: 17: \[8, 4\] is a guess and a range.*tools/search_batch_size.py"),
        ({"241p": {17: [1.0, 4]}}, r"241p is no resolution: write one of 144p, 256, 240p, .*, or a side as 320px"),
    ],
)
def test_a_config_without_a_meaning_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        rungs(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({256: {1: [1.0, 4]}, "256": {17: [1.0, 4]}}, "'256' and '256' are one resolution"),
        ({256: {1: [1.0, 4]}, "256px": {17: [1.0, 4]}}, "'256px' and '256' are one resolution"),
        ({"64px": {1: [1.0, 4]}, 64: {17: [1.0, 4]}}, "64 and '64px' are one resolution"),
        ({"64px": {1: [1.0, 4], "1": [0.5, 4]}}, "64px has 1 frames twice"),
    ],
)
def test_what_stands_twice_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        checked(config)
    assert checked({256: {1: [1.0, 4]}, "240p": {17: [1.0, 4]}}).keys() == {"256", "240p"}


def test_two_rungs_with_one_bucket_share_the_smaller_micro_batch():
    buckets = ClipBuckets(rungs({"256": {1: [0.5, 8]}, "260px": {1: [0.5, 6]}}, factor=64, ratios=[1.0]))
    assert buckets.sizes == [(1, 256, 256)]
    assert buckets.micro_batch_sizes == {(1, 256, 256): 6}


@pytest.mark.parametrize(
    ("config", "ratios", "largest"),
    [
        ({"256px": {1: [1.0, 1], 9: [0.0, None]}, "64px": {5: [1.0, 2], 9: [1.0, 2], 1: [1.0, 2]}}, (), (9, 64, 64)),
        ({"64px": {1: [1.0, 2]}, "256px": {1: [1.0, 1]}}, (), (1, 256, 256)),
        ({"360p": {51: [1.0, 1]}, "240p": {102: [1.0, 1]}}, (9 / 16,), (51, 360, 640)),
    ],
)
def test_the_largest_bucket_is_of_clips_where_there_are_any(config, ratios, largest):
    assert ClipBuckets(rungs(config, 8, ratios)).largest == largest
