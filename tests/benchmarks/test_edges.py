"""The scorer of edge agreement."""

import cv2
import numpy as np
import pytest

from benchmarks.edges import agreement, edges_of
from families.common.scoring import SIDE_PX


def square(left: int, side: int = 40) -> np.ndarray:
    picture = np.full((SIDE_PX, SIDE_PX, 3), 100, np.uint8)
    picture[30 : 30 + side, left : left + side] = (250, 40, 40)
    return picture


def test_edges_within_the_tolerance_agree():
    given = edges_of(square(30))
    assert 150 <= given.sum() <= 170, "the outline of a square of 40 px"
    assert agreement(edges_of(square(30)), given) == 1
    assert agreement(edges_of(square(32)), given) == 1
    # At 3 px, both upright sides are missed.
    assert agreement(edges_of(square(33)), given) == pytest.approx(0.54, abs=0.05)
    assert agreement(edges_of(square(80)), given) < 0.1


def test_missing_and_surplus_edges_count_against_it():
    both = np.concatenate([square(10, 30)[:, :64], square(20, 30)[:, :64]], axis=1)
    one, two = edges_of(square(10, 30)), edges_of(both)
    assert agreement(one, two) == agreement(two, one) < 0.8
    empty = np.zeros_like(one)
    assert (agreement(one, empty), agreement(empty, one), agreement(empty, empty)) == (0, 0, 1)


def test_small_pictures_are_scored_at_the_same_size():
    small = cv2.resize(square(30), (64, 64), interpolation=cv2.INTER_AREA)
    assert agreement(edges_of(small), edges_of(square(30))) > 0.95
