"""Processes that compute each clip together make the updates of one, and a run goes on with other numbers of them."""

import json
from pathlib import Path

import pytest

from families.cascade import versions
from tests.clips import without_pictures, write_clips
from tests.many_processes import launch_processes
from tests.train.test_every_script import (
    _member,
    check_equal,
    settings,  # noqa: F401
    settings_for_two,
    train,
)
from tests.warpcore.runs import read_metrics
from warpcore.config import make_config
from warpcore.errors import ConfigError

BUCKETS = {"40px": {1: [0.5, 2], 5: [1.0, 1]}}


def settings_of(settings, tmp_path: Path, **changes) -> dict:  # noqa: F811
    """Of a run over two sizes, whose frames have 9 and 10 patches, with a file that can't be read."""
    alone = settings_for_two(settings, "train_stdit", tmp_path) | {"image_size": 40, "updates": 8, "save_every": 2}
    damaged = write_clips(tmp_path / "damaged.tar", 2, first=200, size=(64, 64), damage=without_pictures)
    alone["webdataset_path"] = [*alone["webdataset_path"], str(damaged)]
    return alone | {"batch_size": 4, "sample_guidance": 4.0} | changes


def bad_samples(run: dict) -> int:
    return json.loads((Path(run["checkpoint_path"]) / run["experiment_id"] / "info.json").read_text())["bad_samples"]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("use_fsdp", [True, False])
def test_a_run_goes_on_from_two_processes_for_each_clip_on_one_then_on_four(settings, tmp_path, use_fsdp):  # noqa: F811
    alone = settings_of(settings, tmp_path)
    expected = train("train_stdit", alone)
    elastic = alone | {"experiment_id": "elastic"}
    for updates, count, shards in ((3, 2, 2), (5, 1, 1), (8, 4, 2)):
        several = {"use_fsdp": use_fsdp and count > 1, "sequence_shards": shards, "updates": updates}
        launch_processes(count, _member, "train_stdit", elastic | several, versions.VERSIONS["mini"])
        assert len(read_metrics(elastic)) == updates
    check_equal(elastic, alone, expected)
    assert bad_samples(elastic) == bad_samples(alone) > 0


@pytest.mark.slow
@pytest.mark.integration
def test_pictures_and_clips_with_micro_batches_of_their_own_are_counted_once(settings, tmp_path):  # noqa: F811
    sized = {"bucket_config": BUCKETS, "micro_batches_per_update": 4}
    alone = {
        key: value for key, value in settings_of(settings, tmp_path, **sized).items()
        if key not in ("batch_size", "micro_batch_size", "image_size", "num_frames", "multi_aspect_ratio")
    }  # fmt: skip
    expected = train("train_stdit", alone)
    together = alone | {"experiment_id": "together"}
    for updates, shards in ((4, 4), (8, 2)):
        several = {"sequence_shards": shards, "updates": updates}
        launch_processes(4, _member, "train_stdit", together | several, versions.VERSIONS["mini"])
    check_equal(together, alone, expected)
    assert [line["samples"] for line in expected] == [line["samples"] for line in read_metrics(together)]


def test_compiled_blocks_are_refused(settings):  # noqa: F811
    from train.train_stdit import TrainStdit

    with pytest.raises(ConfigError, match="sequence_shards: what processes exchange inside a block can't be compiled"):
        make_config(TrainStdit.Config, settings("train_stdit", "compiled", compile=True, sequence_shards=2))
