"""Buckets against the reference implementation's, and the spellings of a ratio."""

from fractions import Fraction

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import load_case
from warpcore.data.buckets import Buckets, parse_ratio, resized_size
from warpcore.errors import UserError

COMBINATIONS = load_case("bucketeer")[0]["combinations"]
PORTRAIT_AND_SQUARE = ["1/1", "3/4", "9/16"]


@pytest.mark.parametrize("golden", COMBINATIONS, ids=lambda golden: f"{golden['density']}/{golden['factor']}")
def test_sizes_choice_and_resizing_are_those_of_the_reference(golden):
    buckets = Buckets(golden["density"], golden["factor"], golden["ratios"])
    assert buckets.ratios == golden["all_ratios_in_order"]
    assert [list(size) for size in buckets.sizes] == golden["sizes_hw_in_order"]
    assert len(set(buckets.sizes)) == golden["number_of_distinct_buckets"]
    for image in golden["images"]:
        height, width = image["image_hw"]
        size = buckets.choose(width, height, seed=0)
        assert list(size) == image["bucket_hw"]
        resized = resized_size(height, width, size)
        assert list(resized) == image["resized_hw"]
        assert min(resized) == image["resize_short_side"]


sides = st.integers(1, 5000)


@given(sides, sides, st.tuples(sides, sides))
def test_the_resized_picture_covers_its_bucket_and_the_next_smaller_one_does_not(height, width, size):
    resized = resized_size(height, width, size)
    assert resized[0] >= size[0]
    assert resized[1] >= size[1]
    smaller = Fraction(min(resized) - 1, min(height, width))
    assert height * smaller < size[0] or width * smaller < size[1]


def test_many_pictures_get_the_buckets_that_they_get_one_by_one():
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 4000, (2, 500))
    seeds = rng.integers(0, 2**63, 500)
    buckets = Buckets.for_image_size(768, COMBINATIONS[0]["ratios"], random_ratio=0.3)
    indices = buckets.choose_many(widths, heights, seeds)
    one_by_one = [buckets.choose(*picture) for picture in zip(widths, heights, seeds, strict=True)]
    assert [buckets.sizes[index] for index in indices] == one_by_one
    assert len(set(indices.tolist())) == len(set(one_by_one)), "two indices stand for the same bucket"


def test_a_random_bucket_is_drawn_by_the_seed_with_the_given_probability():
    seeds = np.random.default_rng(0).integers(0, 2**63, 20_000)
    squares = np.full(len(seeds), 512)
    buckets = Buckets.for_image_size(512, PORTRAIT_AND_SQUARE, random_ratio=0.4)
    sizes = [buckets.sizes[index] for index in buckets.choose_many(squares, squares, seeds)]
    shares = [sizes.count(size) / len(sizes) for size in buckets.sizes]
    assert shares == pytest.approx([0.6 + 0.4 / 5] + 4 * [0.4 / 5], abs=0.01)
    again = buckets.choose_many(squares[::-1], squares, seeds[::-1])[::-1]
    assert [buckets.sizes[index] for index in again] == sizes, "the draw depends on more than the seed"


def test_the_list_of_the_caller_stays_as_it_was():
    ratios = ["1/1", "16:9"]
    Buckets(512**2, 32, ratios)
    assert ratios == ["1/1", "16:9"]


@pytest.mark.parametrize("ratios", [None, [], [1], ["1/1"]])
def test_without_other_ratios_there_is_one_square_bucket(ratios):
    buckets = Buckets.for_image_size(130, ratios, factor=16)
    assert buckets.sizes == [(128, 128)]
    assert buckets.choose(4000, 30, seed=5) == (128, 128)


def test_ratios_are_understood_as_yaml_delivers_them():
    delivered = yaml.safe_load("[1/1, 16:9, 9:16, 1:2, 21:9, 1.91:1, 16:9.5, 1.5, 2, '3/2']")
    assert 969 in delivered, "YAML no longer reads 16:9 in base 60"
    expected = [1, 16 / 9, 9 / 16, 1 / 2, 21 / 9, 1.91, 16 / 9.5, 1.5, 2, 3 / 2]
    assert [parse_ratio(value) for value in delivered] == pytest.approx(expected)


@pytest.mark.parametrize("value", ["wide", "1/0", "16/9/2", "", "-1", 0, -2.5, 60, True, None, [1], float("nan")])
def test_what_is_no_ratio_is_named(value):
    with pytest.raises(UserError, match=r"multi_aspect_ratio has .* no ratio"):
        parse_ratio(value)


def test_a_bucket_thinner_than_the_factor_is_an_error_that_names_the_ratio():
    with pytest.raises(UserError, match=r"image_size 64 is too small for ratio 0\.16"):
        Buckets(64**2, 32, ["1/1", "1/6"])


def test_one_given_size_is_the_only_bucket():
    only = Buckets.for_image_size((512, 768), factor=64)
    assert only.sizes == [(768, 512)]
    assert only.choose_many([1000, 300], [300, 1000], [0, 1]).tolist() == [0, 0]
    with pytest.raises(UserError, match="multiples of 64 px; write 512x768"):
        Buckets.for_image_size((500, 780), factor=64)
    with pytest.raises(UserError, match="remove multi_aspect_ratio"):
        Buckets.for_image_size((512, 768), [1, 2], factor=64)
