"""Which rows a plan keeps for validation."""

import pytest

from tests.warpcore.data.tars import catalog_of
from tests.warpcore.data.test_plan import NUM_ROWS, SQUARE, keys, many_buckets, take, write_shards
from warpcore.data.plan import Plan
from warpcore.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def catalog(folder):
    return catalog_of(folder)


def test_validation_rows_are_held_out_and_the_same_every_time(catalog):
    plan = Plan(catalog, micro_batch_size=4, buckets=many_buckets(0.5), validation_samples=11, num_lanes=2)
    micro_batches = list(plan.validation())
    held_out = keys(micro_batches)
    assert len(set(held_out)) == len(held_out) == 11
    assert list(plan.validation()) == micro_batches
    assert set(held_out).isdisjoint(keys(take(plan, 200)))
    assert plan.num_rows == NUM_ROWS - 11
    other = Plan(catalog, micro_batch_size=3, buckets=SQUARE, validation_samples=11, seed=5)
    assert set(keys(other.validation())) == set(held_out), "the choice depends on the keys alone"
    more = Plan(catalog, micro_batch_size=3, buckets=SQUARE, validation_samples=15)
    assert set(held_out) < set(keys(more.validation()))


def test_a_validation_path_is_passed_once_and_never_trained_on(folder, catalog):
    plan = Plan(catalog, micro_batch_size=4, buckets=SQUARE, validation=catalog_of(folder / "2.tar"))
    held_out = keys(plan.validation())
    assert sorted(held_out) == [f"{number:06d}" for number in range(8, 28)]
    assert set(held_out).isdisjoint(keys(take(plan, 60)))
    with pytest.raises(UserError, match="not both"):
        Plan(catalog, micro_batch_size=4, buckets=SQUARE, validation=catalog, validation_samples=1)


def test_without_validation_there_is_none(catalog):
    plan = Plan(catalog, micro_batch_size=4, buckets=SQUARE)
    assert not plan.has_validation
    assert list(plan.validation()) == []


def test_seeds_by_key_are_those_of_another_run_of_other_tars(folder, catalog):
    whole = Plan(catalog, micro_batch_size=4, buckets=SQUARE, validation=catalog, validation_by_key=True)
    part = Plan(
        catalog, micro_batch_size=3, buckets=SQUARE, validation=catalog_of(folder / "2.tar"), validation_by_key=True,
        seed=5,
    )  # fmt: skip
    seeds, of_part = (
        {one.key: one.seed for batch in plan.validation() for one in batch.samples} for plan in (whole, part)
    )
    assert len(set(seeds.values())) == len(seeds) > len(of_part) == 20
    assert all(seeds[key] == seed for key, seed in of_part.items())
