"""Plans with buckets of clips: which rows go where, by chance too, and how many make a micro-batch."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from tests.warpcore.data.tars import catalog_of
from tests.warpcore.data.test_plan import BY_CHANCE, NUM_ROWS, SHARD_ROWS, keys, resolutions, take, write_shards
from warpcore.data.clip_buckets import ClipBuckets, rungs_of
from warpcore.data.index import read_rows
from warpcore.data.plan import Plan
from warpcore.errors import UserError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return catalog_of(write_shards(tmp_path_factory.mktemp("data")))


def test_micro_batches_have_the_size_of_their_bucket_and_rows_are_left_out_by_chance(catalog):
    plan = Plan(catalog, micro_batch_size=None, buckets=BY_CHANCE, seed=3)
    micro_batches = take(plan, 200)
    for one in micro_batches:
        assert len(one.samples) == BY_CHANCE.micro_batch_sizes[one.size]
    epochs = micro_batches[-1].epoch
    counts = Counter(one.size for one in micro_batches for _ in one.samples)
    # Of 80 pictures 32 have the area of 16 px, all that of 12; half of the 32 stay, 0.6 of all others, ...
    survey = plan.survey
    assert survey.buckets == pytest.approx({
        "16px x 1 frame": 16, "12px x 1 frame": 0.6 * 64, "8px x 1 frame": 0.9 * 0.4 * 64,
    })  # fmt: skip
    assert survey.per_epoch == pytest.approx(sum(survey.buckets.values()))
    assert survey.micro_batches_per_epoch == pytest.approx(16 / 2 + 38.4 / 3 + 23.04 / 4)
    large = sum(count for size, count in counts.items() if max(size) == 16 and size[1] == size[2])
    assert large / epochs == pytest.approx(16, rel=0.25)
    assert sum(counts.values()) / epochs == pytest.approx(survey.per_epoch, rel=0.1)
    assert "rows per bucket and epoch, on average: 16px x 1 frame: 16, 12px x 1 frame: 38.4" in str(survey)
    (note,) = next(one.notes for one in micro_batches if one.epoch == 1)
    assert "rejected: left out this time, by the probabilities in bucket_config" in note
    fingerprint = json.loads(json.dumps(plan.fingerprint))
    assert plan.difference(fingerprint) is None
    other = Plan(catalog, micro_batch_size=None, buckets=resolutions(_16=0.4, _12=0.6, _8=0.9), seed=3)
    assert "bucket_config changed" in other.difference(fingerprint)


@pytest.fixture
def with_videos(monkeypatch):
    """Every second row of an index is a video: row n has n frames at 24 per second."""

    def read(shard, columns=None, start=0, stop=None):
        rows = read_rows(shard, columns, start, stop)
        numbers = np.arange(start, start + len(rows))
        for name, values in (("num_frames", numbers), ("fps", np.full(len(rows), 24.0))):
            rows = rows.append_column(
                name, pa.array(values, pa.float32() if name == "fps" else pa.int32(), mask=numbers % 2 == 0)
            )
        return rows

    monkeypatch.setattr("warpcore.data.selection.read_rows", read)


@pytest.mark.parametrize("stride", [1, 2])
def test_clips_and_pictures_go_to_buckets_that_they_fill(catalog, with_videos, stride):
    rungs = rungs_of({"16px": {9: (1.0, 2), 1: (1.0, 3)}, "12px": {5: (1.0, 1), 1: (1.0, 4)}}, 4)
    plan = Plan(catalog, micro_batch_size=None, buckets=ClipBuckets(rungs, stride), seed=2, group_rows=20, num_lanes=2)
    micro_batches = take(plan, 150)
    for one in micro_batches:
        assert len(one.samples) == {(9, 16, 16): 2, (1, 16, 16): 3, (5, 12, 12): 1, (1, 12, 12): 4}[one.size]
        for sample in one.samples:
            area, frames = sample.width * sample.height, sample.num_frames
            assert (frames > 1) == (one.size[0] > 1)
            if frames > 1:
                assert one.size[0] == (9 if area == 256 and frames > 8 * stride else 5), (area, frames)
                assert frames > (one.size[0] - 1) * stride
            else:
                assert one.size[1] == (16 if area == 256 else 12)
    drawn = Counter(keys(one for one in micro_batches if one.epoch < 1))
    assert max(drawn.values()) == 1
    survey = plan.survey
    short = sum(1 < number <= 4 * stride for rows in SHARD_ROWS for number in range(1, rows, 2))
    assert f"{short} rejected: too few frames for the shortest bucket (5 frames" in str(survey)
    assert survey.passed == NUM_ROWS - short == sum(survey.buckets.values())
    states = {one.lane: one.state for one in micro_batches[:60]}
    assert take(plan, 90, start=60, lane_states=json.loads(json.dumps(states))) == micro_batches[60:]


def test_rows_that_fit_no_bucket_are_counted_and_not_held_out(catalog):
    plan = Plan(catalog, micro_batch_size=None, buckets=resolutions(_16=1.0), validation_samples=4)
    assert "28 of 80 rows can be drawn; 48 rejected: too small" in str(plan.survey)
    assert len(keys(plan.validation())) == 4
    with pytest.raises(UserError, match="0 of 80 rows can be drawn; 80 rejected: too small"):
        take(Plan(catalog, micro_batch_size=None, buckets=resolutions(_64=1.0)), 1)


def test_chance_that_keeps_no_row_ends_the_run(catalog, monkeypatch):
    monkeypatch.setattr("warpcore.data.lanes.MAX_EMPTY_EPOCHS", 20)
    plan = Plan(catalog, micro_batch_size=None, buckets=resolutions(_8=1e-12))
    with pytest.raises(UserError, match="bucket_config: its probabilities kept none of the 80 rows of lane 0 in 20"):
        take(plan, 1)


def test_chance_that_keeps_no_sample_for_validation_is_an_error(catalog):
    plan = Plan(catalog, micro_batch_size=None, buckets=resolutions(_8=1e-12), validation_samples=4)
    with pytest.raises(UserError, match="bucket_config: its probabilities keep none of 4 samples for validation"):
        list(plan.validation())
    some = Plan(catalog, micro_batch_size=None, buckets=resolutions(_8=0.5), validation_samples=40)
    assert 5 < len(keys(some.validation())) < 35
