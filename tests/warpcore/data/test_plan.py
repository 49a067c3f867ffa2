import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.clip_buckets import ClipBuckets, rungs_of
from warpcore.data.filters import Filter
from warpcore.data.lanes import occurrences_in_epoch
from warpcore.data.plan import Plan, describe_difference
from warpcore.data.storage import LocalStorage
from warpcore.errors import UserError
from warpcore.random import stable_hash

SHARD_ROWS = (1, 7, 20, 33, 5, 14)
NUM_ROWS = sum(SHARD_ROWS)
PICTURES = ((16, 12), (12, 16), (16, 16), (16, 16), (24, 8))
SQUARE = Buckets(16 * 16, 4)


def many_buckets(random_ratio: float = 0.0) -> Buckets:
    return Buckets(16 * 16, 4, [1, 4 / 3], random_ratio)


def resolutions(**shares: float) -> ClipBuckets:
    """Buckets of one frame with micro-batch sizes of their own, 2 to 4, each resolution with a share to keep."""
    config = {f"{name[1:]}px": {1: (share, 2 + i)} for i, (name, share) in enumerate(shares.items())}
    return ClipBuckets(rungs_of(config, 4, [1, 4 / 3]))


UNEQUAL = resolutions(_16=1.0, _12=1.0, _8=1.0)
BY_CHANCE = resolutions(_16=0.5, _12=0.6, _8=0.9)


def write_shards(folder: Path) -> Path:
    """Tars of NUM_ROWS rows."""
    first = 0
    for number, rows in enumerate(SHARD_ROWS):
        write_shard(folder / f"{number}.tar", rows, first, PICTURES)
        first += rows
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def catalog(folder):
    return catalog_of(folder)


def take(plan: Plan, count: int, **arguments) -> list:
    return list(islice(plan.micro_batches(**arguments), count))


def keys(micro_batches) -> list[str]:
    return [sample.key for micro_batch in micro_batches for sample in micro_batch.samples]


plans = st.fixed_dictionaries(
    {
        "micro_batch_size": st.integers(1, 9),
        "num_lanes": st.integers(1, 4),
        "group_rows": st.sampled_from([6, 25, 1000]),
        "seed": st.integers(0, 3),
        "buckets": st.sampled_from([SQUARE, many_buckets(), many_buckets(0.5), UNEQUAL]),
        "validation_samples": st.sampled_from([0, 5]),
        "filters": st.sampled_from([[], [Filter.parse(["parity", "lambda p: p == 0"])]]),
    }
)


@pytest.mark.integration
@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 120))
def test_each_epoch_draws_every_row_of_its_lane_once(catalog, arguments, count):
    plan = Plan(catalog, **arguments)
    held_out = Counter(keys(plan.validation()))
    names = [f"{n:06d}" for n in range(NUM_ROWS)]
    starts = np.cumsum([0, *SHARD_ROWS])
    drawn: dict[int, Counter] = {}
    epochs: dict[int, int] = {}
    for micro_batch in take(plan, count):
        lane = drawn.setdefault(micro_batch.lane, Counter())
        lane.update(sample.key for sample in micro_batch.samples)
        epochs[micro_batch.lane] = micro_batch.epoch
        waiting = [draw for draws in micro_batch.state["waiting"].values() for draw in draws]
        of_lane = lane + Counter(names[starts[shard] + row] for shard, row, _, _ in waiting)
        assert set(of_lane.values()) <= {micro_batch.epoch, micro_batch.epoch + 1}
    rows_of_lanes = [set(lane) for lane in drawn.values()]
    assert sum(map(len, rows_of_lanes)) == len(set().union(*rows_of_lanes)), "no row belongs to two lanes"
    wanted = {n for i, n in enumerate(names) if not arguments["filters"] or i % 2 == 0} - set(held_out)
    assert set().union(*rows_of_lanes) <= wanted
    assert plan.num_rows == len(wanted)


@pytest.mark.integration
@settings(max_examples=20, deadline=None)
@given(plans, st.integers(0, 40), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_a_run_goes_on_exactly_where_its_lane_states_say_on_any_number_of_processes(
    catalog, arguments, stop, before, after, by_chance
):
    arguments |= {"buckets": BY_CHANCE} if by_chance else {}
    plan = Plan(catalog, **arguments)
    whole = take(plan, stop + 20)
    assert [micro_batch.number for micro_batch in whole] == list(range(stop + 20))
    states = {}
    for rank in range(before):
        for micro_batch in plan.micro_batches(rank=rank, num_processes=before):
            if micro_batch.number >= stop:
                break
            assert micro_batch == whole[micro_batch.number]
            if micro_batch.number > states.get(micro_batch.lane, (-1, None))[0]:
                states[micro_batch.lane] = (micro_batch.number, micro_batch.state)
    saved = json.loads(json.dumps({lane: state for lane, (_, state) in states.items()}))
    resumed = Plan(catalog, **arguments)
    for rank in range(after):
        for micro_batch in resumed.micro_batches(rank=rank, num_processes=after, start=stop, lane_states=saved):
            if micro_batch.number >= stop + 20:
                break
            assert micro_batch.number % after == rank
            assert micro_batch == whole[micro_batch.number]


def test_pictures_keep_the_order_and_states_of_runs_that_began_before_there_were_clips(catalog):
    """The number was computed by the code before that; so runs of pictures go on from their checkpoints."""
    arguments = {"micro_batch_size": 3, "seed": 1, "num_lanes": 2, "group_rows": 25, "validation_samples": 5}
    plan = Plan(catalog, buckets=many_buckets(0.5), **arguments)
    whole = [
        [one.number, one.size, [(s.key, s.seed) for s in one.samples], one.lane, one.state, one.epoch]
        for one in take(plan, 60)
    ]
    assert stable_hash(json.dumps(whole)) == 3237130744184962388
    saved = plan.fingerprint | {"shards": 0, "validation_shards": 0}
    assert saved == {
        "plan_version": 2, "seed": 1, "micro_batch_size": 3, "lanes": 2, "shard_group_rows": 25, "dataset_filters": [],
        "captions_getter": None, "required_members": [], "max_picture_pixels": None, "validation_samples": 5,
        "bucket_sizes": [[16, 16], [12, 16], [16, 12]], "bucketeer_random_ratio": 0.5, "shards": 0,
        "validation_shards": 0,
    }  # fmt: skip


def test_lanes_are_balanced_by_rows_and_groups_come_in_a_new_order(catalog):
    plan = Plan(catalog, micro_batch_size=1, buckets=SQUARE, num_lanes=2, group_rows=1000)
    firsts = [micro_batch for micro_batch in take(plan, 150) if micro_batch.epoch == 0]
    assert Counter(micro_batch.lane for micro_batch in firsts) == {0: 40, 1: 40}
    drawn = keys(take(Plan(catalog, micro_batch_size=1, buckets=SQUARE, group_rows=1), 3 * NUM_ROWS))
    assert drawn[:NUM_ROWS] != drawn[NUM_ROWS : 2 * NUM_ROWS] != drawn[2 * NUM_ROWS :]


def test_a_start_without_states_replays_and_a_state_from_later_on_is_refused(catalog):
    plan = Plan(catalog, micro_batch_size=4, buckets=many_buckets(), num_lanes=3, group_rows=20)
    whole = take(plan, 40)
    assert take(plan, 10, start=30) == whole[30:]
    with pytest.raises(
        UserError, match="lane 0 is after 14 of its micro-batches, but only 1 of them come before number 3"
    ):
        take(plan, 1, start=3, lane_states={0: whole[39].state})
    with pytest.raises(UserError, match="there is no lane 3"):
        take(plan, 1, lane_states={"3": whole[0].state})


def test_with_one_bucket_and_one_lane_the_order_does_not_depend_on_the_micro_batch_size(catalog):
    orders = [
        keys(take(Plan(catalog, micro_batch_size=size, buckets=SQUARE, group_rows=30), 240 // size))
        for size in (1, 4, 8)
    ]
    assert orders[0] == orders[1] == orders[2]


def test_a_micro_batch_holds_one_bucket_and_the_members_of_its_samples(catalog, folder):
    buckets = many_buckets()
    for micro_batch in take(Plan(catalog, micro_batch_size=4, buckets=buckets), 20):
        for sample in micro_batch.samples:
            assert buckets.choose(sample.width, sample.height, sample.seed) == micro_batch.size
            assert (sample.width, sample.height) == PICTURES[int(sample.key) % len(PICTURES)]
            offset, size = sample.members["txt"]
            with open(sample.shard, "rb") as file:
                file.seek(offset)
                assert file.read(size).decode() == f"caption {int(sample.key)}"


def test_order_and_seeds_follow_the_run_seed_and_not_the_place_of_the_data(catalog, folder, tmp_path):
    def drawn(catalog, seed):
        samples = [
            s for m in take(Plan(catalog, micro_batch_size=4, buckets=SQUARE, seed=seed), 40) for s in m.samples
        ]
        return [sample.key for sample in samples], [sample.seed for sample in samples]

    order, seeds = drawn(catalog, 0)
    assert len(set(seeds)) == len(seeds)
    assert order[:NUM_ROWS] != sorted(order[:NUM_ROWS])
    assert order[:NUM_ROWS] != order[NUM_ROWS : 2 * NUM_ROWS]
    assert drawn(catalog, 1)[0] != order
    shutil.copytree(folder, tmp_path / "copy")
    assert drawn(catalog_of(tmp_path / "copy"), 0) == (order, seeds)


def test_the_seed_of_a_sample_does_not_depend_on_lanes_groups_or_batch_size(catalog):
    def first_epoch(**arguments):
        plan = Plan(catalog, buckets=SQUARE, **arguments)
        samples = [s for m in take(plan, 200 // arguments["micro_batch_size"]) for s in m.samples if m.epoch == 0]
        return {sample.key: sample.seed for sample in samples}

    one = first_epoch(micro_batch_size=1)
    other = first_epoch(micro_batch_size=4, num_lanes=3, group_rows=9)
    assert len(other) > 40
    assert other.items() <= one.items()


def test_a_plan_reads_no_tar(catalog, monkeypatch):
    opened = LocalStorage.open
    monkeypatch.setattr(
        LocalStorage, "open", lambda self, url: pytest.fail(url) if url.endswith(".tar") else opened(self, url)
    )
    take(Plan(catalog, micro_batch_size=4, buckets=SQUARE, validation_samples=3), 50)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 5), st.integers(0, 2**64 - 1))
def test_a_weight_is_how_often_a_row_occurs_per_epoch(weight, value):
    counts = [
        occurrences_in_epoch(np.array([value], np.uint64), np.array([weight]), epoch).item() for epoch in range(200)
    ]
    assert abs(sum(counts) - 200 * weight) <= 1 + 1e-6
    assert set(counts) <= {int(weight), int(weight) + 1}


def test_sources_are_mixed_by_weight_as_distinct_repeats(folder):
    catalog = catalog_of({"path": str(folder / "2.tar"), "weight": 2}, {"path": str(folder / "3.tar"), "weight": 0.5})
    micro_batches = take(Plan(catalog, micro_batch_size=1, buckets=SQUARE), 4 * 40 + 66)
    for epoch in range(2):
        samples = [sample for m in micro_batches if m.epoch == epoch for sample in m.samples]
        counts = Counter(sample.key for sample in samples if sample.shard.endswith("2.tar"))
        assert set(counts.values()) == {2}
        assert len(counts) == SHARD_ROWS[2]
        assert len({sample.seed for sample in samples}) == len(samples)
    halves = [
        {s.key for m in micro_batches if m.epoch == epoch for s in m.samples if s.shard.endswith("3.tar")}
        for epoch in range(4)
    ]
    assert halves[0].isdisjoint(halves[1])
    assert len(halves[0] | halves[1]) == SHARD_ROWS[3]
    assert halves[0] == halves[2]
    assert 8 <= len(halves[0]) <= 25


def test_filters_and_captions_decide_who_is_drawn_and_the_epochs_note_counts_the_others(tmp_path):
    members = [("a.jpg", picture()), ("a.txt", b""), ("b.jpg", picture()), ("c.jpg", b"x"), ("c.txt", b"")]
    for number in range(6):
        text = json.dumps({"score": number} if number else {})
        members += [(f"{number}.jpg", picture()), (f"{number}.txt", b""), (f"{number}.json", text.encode())]
    catalog = catalog_of(write_tar(tmp_path / "x.tar", members))
    plan = Plan(
        catalog,
        micro_batch_size=1,
        buckets=SQUARE,
        filters=[Filter.parse(["score", "lambda s: s > 2"])],
        captions=CaptionGetter.parse(["txt", "identity"]),
    )
    micro_batches = take(plan, 4)
    assert sorted(keys(micro_batches[:3])) == ["3", "4", "5"]
    (note,) = micro_batches[3].notes
    assert note.startswith("epoch 0 is over: 3 rows drawn;")
    for reason in (
        "2 rejected: ['score', 'lambda s: s > 2'];",
        "2 rejected: ['score', 'lambda s: s > 2'] (value missing)",
        "1 rejected: no .txt",
        "1 rejected: undecodable picture",
    ):
        assert reason in note
    assert str(plan.survey).startswith("3 of 9 rows can be drawn")


def test_waiting_rows_are_told_and_a_rare_bucket_fills_with_later_epochs(tmp_path):
    sizes = ((16, 16),) * 9 + ((24, 8),)
    catalog = catalog_of(write_shard(tmp_path / "x.tar", 10, 0, sizes))
    micro_batches = take(Plan(catalog, micro_batch_size=4, buckets=Buckets(256, 4, [1, 3])), 12)
    rare = next(m for m in micro_batches if m.size != (16, 16))
    assert rare.epoch == 3
    assert len({sample.key for sample in rare.samples}) == 1
    assert len({sample.seed for sample in rare.samples}) == 4
    (note,) = next(m.notes for m in micro_batches if m.epoch == 1)
    assert "2 wait for a full micro-batch (8x24: 1, 16x16: 1)" in note


def test_fewer_rows_than_a_micro_batch_still_train_and_that_is_said(tmp_path):
    catalog = catalog_of(write_shard(tmp_path / "x.tar", 3))
    first, second = take(Plan(catalog, micro_batch_size=8, buckets=SQUARE), 2)
    assert set(Counter(sample.key for sample in first.samples).values()) == {2, 3}
    assert len({sample.seed for sample in first.samples + second.samples}) == 16
    assert "fewer than a micro-batch of 8: a picture occurs more than once" in first.notes[0]


def test_a_filter_that_rejects_everything_says_what_the_column_holds(catalog):
    filters = [Filter.parse(["score", "lambda s: s > 99"]), Filter.parse(["parity", "lambda p: p == 0"])]
    plan = Plan(catalog, micro_batch_size=4, buckets=SQUARE, filters=filters, num_lanes=2)
    with pytest.raises(UserError, match=r"0 of 80 rows can be drawn; 80 rejected: \['score'.*score is 0 .. 7.9"):
        take(plan, 1)


def test_a_lane_left_without_rows_names_the_remedy(folder):
    filters = [Filter.parse(["score", "lambda s: s < 0.05"])]
    plan = Plan(catalog_of(folder), micro_batch_size=1, buckets=SQUARE, filters=filters, num_lanes=3)
    with pytest.raises(UserError, match=r"set lanes to 1.*1 of 80 rows"):
        take(plan, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": [Filter.parse(["scor", "lambda s: s"])]}, "no sample has 'scor'. Did you mean 'score'"),
        (
            {"captions": CaptionGetter.parse(["caption", "identity"])},
            r"captions_getter: no sample has a \.caption.*jpg, json, txt\. Write one of these into captions_getter",
        ),
        (
            {"captions": CaptionGetter.parse(["json", 'lambda j: j["caption"]'])},
            "no sample has 'caption'.*parity, score",
        ),
        ({"required_members": ["mask.png"]}, r"^no sample has a \.mask\.png"),
        (
            {"required_members": ["cls"], "member_keys": {"cls": "class_getter"}},
            r"class_getter: .*put NAME\.cls beside",
        ),
        ({"validation_samples": 80}, "80 leaves no row for training: only 80 of 80 rows can be drawn"),
        (
            {"validation_samples": 8, "filters": [Filter.parse(["width", "lambda w: w > 9999"])]},
            "no sample can be drawn: 0 of 80 rows.*80 rejected: .*w > 9999",
        ),
        ({"num_lanes": 81}, "lanes is 81, more than"),
        ({"micro_batch_size": 0}, "at least 1"),
    ],
)
def test_a_plan_that_can_not_work_is_refused_at_once(catalog, arguments, message):
    with pytest.raises(UserError, match=message):
        Plan(catalog, **{"micro_batch_size": 4, "buckets": SQUARE, **arguments})


def test_a_filter_that_fails_names_the_tar(tmp_path):
    members = [("a.jpg", picture()), ("a.json", b'{"s": "x"}')]
    plan = Plan(
        catalog_of(write_tar(tmp_path / "odd.tar", members)),
        micro_batch_size=1,
        buckets=SQUARE,
        filters=[Filter.parse(["s", "lambda s: s > 1"])],
    )
    with pytest.raises(UserError, match=r"odd.tar: .*sample 'a' {'s': 'x'}: TypeError"):
        take(plan, 1)


def test_a_difference_to_the_checkpoint_is_named(folder, catalog, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")

    def fingerprint(path=tmp_path / "copy", **arguments):
        settings = {"micro_batch_size": 4, "buckets": SQUARE, **arguments}
        return json.loads(json.dumps(Plan(catalog_of(path), **settings).fingerprint))

    saved = fingerprint()
    assert describe_difference(saved, fingerprint()) is None
    assert describe_difference(saved, fingerprint(folder)) is None, "copied with their times"
    pictures = [["mask.png", "jpg", "png"], ["mask.png", "jpg", "png", "avif"]]  # more are read now than once
    assert describe_difference(*({"required_members": [names]} for names in pictures)) is None
    assert describe_difference({"required_members": []}, {"required_members": [["depth.png"]]}) is not None
    assert describe_difference(saved, fingerprint(micro_batch_size=8)) == "micro_batch_size changed: 4 -> 8"
    filtered = describe_difference(saved, fingerprint(filters=[Filter.parse(["score", "lambda s: s > 1"])]))
    assert filtered == """dataset_filters changed: [] -> ["['score', 'lambda s: s > 1']"]"""
    assert "bucket_sizes changed" in describe_difference(saved, fingerprint(buckets=many_buckets()))
    weighted = describe_difference(saved, fingerprint({"path": str(tmp_path / "copy"), "weight": 2}))
    assert weighted.startswith("shard 0.tar changed: 10240 bytes, content ")
    assert weighted.endswith(", weight 2; 3 more shards changed")
    write_shard(tmp_path / "copy/1.tar", 9)
    (tmp_path / "copy/0.tar").unlink()
    write_shard(tmp_path / "copy/9.tar", 1)
    changed = describe_difference(saved, fingerprint())
    assert changed.startswith("shard 1.tar changed: ")
    assert changed.endswith("; shard 0.tar is gone; shard 9.tar is new")


def test_changed_data_can_start_a_fresh_epoch(catalog):
    plan = Plan(catalog, micro_batch_size=4, buckets=many_buckets(), num_lanes=2)
    states = plan.fresh_lane_states(start=13, epoch=5)
    micro_batches = take(plan, 9, start=13, lane_states=json.loads(json.dumps(states)))
    assert [m.number for m in micro_batches] == list(range(13, 22))
    assert {m.epoch for m in micro_batches} <= {5, 6}
    first = Counter(sample.key for m in micro_batches if m.epoch == 5 for sample in m.samples)
    assert set(first.values()) == {1}
