"""Processes that compute each clip together make the updates, and the videos, of one; a run goes on with other numbers
of them."""

import json
import os
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from PIL import Image

from families.cascade import versions
from families.common.text_to_video import VideoFiles
from inference.text_to_video import main
from tests.caches import SCRIPTS
from tests.clips import without_pictures, write_clips
from tests.families.open_sora.tiny import write_mini
from tests.many_processes import launch_processes
from tests.train.test_every_script import (
    check_equal,
    member,
    settings,  # noqa: F401
    settings_for_two,
    train,
)
from tests.warpcore.runs import read_metrics
from tools import memory, search_batch_size
from train.train_stdit import TrainStdit
from train.train_stdit_lora import TrainStditLora
from warpcore import feed
from warpcore.config import make_config
from warpcore.errors import ConfigError, UserError
from warpcore.planning import Plan

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
        launch_processes(count, member, "train_stdit", elastic | several, versions.VERSIONS["mini"])
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
        launch_processes(4, member, "train_stdit", together | several, versions.VERSIONS["mini"])
    check_equal(together, alone, expected)
    assert [line["samples"] for line in expected] == [line["samples"] for line in read_metrics(together)]


class FailingLoader(feed.Loader):
    """The disk fails before the first micro-batch of another size."""

    def __iter__(self):
        for one, after in pairwise(super().__iter__()):
            yield one
            if after.size != one.size:
                raise OSError("the disk is gone")


def fail_to_read(run: dict) -> None:
    if os.environ["RANK"] == "1":
        feed.Loader = FailingLoader
    with pytest.raises(UserError, match="training data can't be read any more: the disk is gone"):
        TrainStdit(make_config(TrainStdit.Config, run)).run()


@pytest.mark.slow
@pytest.mark.integration
def test_where_one_process_of_a_group_cannot_read_all_keep_what_was_learned_before(settings, tmp_path):  # noqa: F811
    """Also where the others hold a batch of another size than its last one."""
    run = settings_of(settings, tmp_path, sequence_shards=2, batch_size=1, save_every=8, validation_samples=0)
    launch_processes(2, fail_to_read, run)
    assert 1 <= len(read_metrics(run)) < 8


def test_compiled_blocks_are_refused(settings):  # noqa: F811
    with pytest.raises(ConfigError, match="sequence_shards: what processes exchange inside a block can't be compiled"):
        make_config(TrainStdit.Config, settings("train_stdit", "compiled", compile=True, sequence_shards=2))


def test_adapters_that_would_drop_the_same_in_each_part_are_refused(settings):  # noqa: F811
    given = settings("train_stdit_lora", "dropped", lora_dropout=0.1)
    assert make_config(TrainStditLora.Config, given).lora_dropout == 0.1
    with pytest.raises(ConfigError, match="lora_dropout: with sequence_shards it would drop the same in the parts"):
        make_config(TrainStditLora.Config, given | {"sequence_shards": 2})


def test_tools_count_the_processes_that_share_each_clip_once(settings, tmp_path, monkeypatch):  # noqa: F811
    given = settings("train_stdit", "planned", sequence_shards=2, batch_size=4, micro_batch_size=2)
    plan = Plan(TrainStdit, make_config(TrainStdit.Config, given), "cpu", 4)
    assert (plan.micro_batch, plan.accumulation) == (2, 1)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(given))
    arguments = [str(SCRIPTS / "train_stdit.py"), str(config), "--processes", "3"]
    for tool, more in ((memory, []), (search_batch_size, [str(tmp_path / "tuned.yaml")])):
        monkeypatch.setattr(sys, "argv", ["tool", *arguments[:2], *more, *arguments[2:]])
        with pytest.raises(UserError, match="sequence_shards: 2 does not divide the 3 processes; write one of 1, 3"):
            tool.main()


def draw(folder: Path, *arguments: str) -> None:
    """Six videos of two frames of latents with 9 patches each, by a mini of random weights."""
    sys.argv = [
        "text_to_video.py", f"generator_checkpoint_path={folder / 'network.safetensors'}", "model_version=mini",
        "text_encoder_precision=float32", "steps=2", "device=cpu", "image_size=40", "num_frames=5", "batch_size=2",
        "seeds=[1, 2]", 'prompts=["a red box", "a star", "a ring"]', *arguments,
    ]  # fmt: skip
    main()


@pytest.mark.slow
@pytest.mark.integration
def test_groups_of_processes_draw_the_videos_of_one(tmp_path, capfd):
    write_mini(tmp_path / "network.safetensors")
    draw(tmp_path, f"output_path={tmp_path / 'alone'}")
    expected = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len(expected) == 7
    for count, arguments in ((4, ["sequence_shards=2"]), (2, [])):
        folder = tmp_path / str(count)
        launch_processes(count, draw, tmp_path, f"output_path={folder}", *arguments)
        assert sorted(path.name for path in folder.iterdir()) == expected
        sheets = [np.asarray(Image.open(one / "grid.png"), dtype=int) for one in (folder, tmp_path / "alone")]
        assert abs(sheets[0] - sheets[1]).max() <= 1
    capfd.readouterr()
    with pytest.raises(UserError, match="sequence_shards: 3 does not divide the 4 heads of the network; write one of"):
        draw(tmp_path, "sequence_shards=3")
    with pytest.raises(UserError, match="sequence_shards: 2 does not divide the 1 processes; write one of 1"):
        draw(tmp_path, "sequence_shards=2")


def draw_with_little_patience(folder: Path) -> None:
    """The second process, which has no video to draw, waits longer for the first than they do for each other."""
    finish = VideoFiles.finish

    def late(self, *arguments):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        time.sleep(4 * (dist.get_rank() == 0))
        finish(self, *arguments)

    VideoFiles.finish = late
    draw(folder, f"output_path={folder / 'late'}", "sequence_shards=1", "seeds=[1]", 'prompts=["a red box"]')


@pytest.mark.slow
@pytest.mark.integration
def test_processes_without_a_video_wait_for_the_others_as_long_as_these_draw(tmp_path):
    write_mini(tmp_path / "network.safetensors")
    launch_processes(2, draw_with_little_patience, tmp_path)
    assert len(list((tmp_path / "late").iterdir())) == 2
