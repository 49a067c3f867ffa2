"""Every training script on 1, 2 and 4 processes, one after the other, makes the updates of one process."""

import pytest

from families.cascade import versions
from tests.many_processes import launch_processes
from tests.train.test_every_script import (
    SETTINGS,
    _member,
    check_equal,
    settings,  # noqa: F401
    settings_for_two,
    train,
)
from tests.warpcore.runs import read_metrics


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_run_goes_on_from_one_process_on_two_then_four_then_one(settings, name, tmp_path):  # noqa: F811
    alone = settings_for_two(settings, name, tmp_path) | {"updates": 8, "save_every": 2}
    alone["batch_size"] = 4 * alone["micro_batch_size"]
    expected = train(name, alone)
    elastic = alone | {"experiment_id": "elastic"}
    for updates, count in ((2, 1), (4, 2), (6, 4), (8, 1)):
        launch_processes(count, _member, name, elastic | {"updates": updates}, versions.VERSIONS["mini"])
        assert len(read_metrics(elastic)) == updates
    check_equal(elastic, alone, expected)
