"""Every training script on 1, 2 and 4 processes, one after the other, killed and stopped, makes the updates of one."""

import signal

import pytest
from torch.multiprocessing import ProcessExitedException

from families.cascade import versions
from tests.many_processes import launch_processes
from tests.train.test_every_script import (
    SETTINGS,
    check_equal,
    member,
    settings,  # noqa: F401
    settings_for_two,
    train,
)
from tests.warpcore.runs import read_metrics


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(name for name in SETTINGS if " " not in name))  # each script in one way
def test_a_run_that_is_killed_then_stopped_goes_on_on_two_processes_then_four_then_one(settings, name, tmp_path):  # noqa: F811
    alone = settings_for_two(settings, name, tmp_path) | {"updates": 8, "save_every": 2}
    alone["batch_size"] = 4 * alone["micro_batch_size"]
    expected = train(name, alone)
    elastic, mini = alone | {"experiment_id": "elastic"}, versions.VERSIONS["mini"]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):  # after the save at update 2
        launch_processes(1, member, name, elastic, mini, signal.SIGKILL, 3)
    launch_processes(2, member, name, elastic, mini, signal.SIGTERM, 3)
    assert 4 <= len(read_metrics(elastic)) < 6
    launch_processes(4, member, name, elastic | {"updates": 6}, mini)
    assert len(read_metrics(elastic)) == 6
    train(name, elastic)
    check_equal(elastic, alone, expected)
