"""The loader and SPDL make the same squares of the same pictures."""

import numpy as np
import pytest

from benchmarks import data, squares

pytest.importorskip("spdl.io", reason="SPDL is not installed")


def first_batch(contender, paths, num_workers):
    with contender(paths, num_workers) as batches:
        return np.array(next(batches), np.int16)


@pytest.mark.integration
def test_both_make_the_same_squares(tmp_path):
    pictures = data.photographs(squares.MICRO_BATCH_SIZE, 0.5e6, 1e6, squares.RATIOS)
    paths = data.write_tars(pictures, tmp_path)
    expected, given = first_batch(squares.ours, paths, 0), first_batch(squares.spdl, paths, 1)
    assert expected.shape == given.shape == (squares.MICRO_BATCH_SIZE, squares.SIDE, squares.SIDE, 3)
    differences = np.array([[np.abs(one - other).mean() for other in given] for one in expected])
    assert (differences.min(axis=1) < 4).all()
    assert sorted(differences.argmin(axis=1)) == list(range(len(pictures)))
