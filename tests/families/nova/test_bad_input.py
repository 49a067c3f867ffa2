"""A training of NOVA that cannot be is one clear error, which names what to write instead."""

import json

import pytest
import torch
from safetensors.torch import save_file

from families.common.library_files import CONFIG_KEY
from families.nova import build
from families.nova.config import NovaConfig
from families.nova.versions import VERSIONS, version_of
from modules.nova import NOVATransformer
from train.train_nova import TrainNova
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError


def training(**changes) -> TrainNova:
    given = {
        "experiment_id": "run", "checkpoint_path": "runs", "webdataset_path": "a.tar", "updates": 1, "batch_size": 2,
        "model_version": "mini", "num_frames": 1, "image_size": 128, "device": "cpu",
    }  # fmt: skip
    return TrainNova(make_config(NovaConfig, given | changes))


def test_clips_for_a_network_of_pictures_are_refused():
    with pytest.raises(ConfigError, match="mini draws pictures, and this run has clips of 5 frames: write num_frames"):
        training(num_frames=5).begin(None)


def test_several_sizes_need_rotary_positions():
    with pytest.raises(ConfigError, match="this network has places for one size: write one size, or rotary_pos_embed"):
        _ = training(multi_aspect_ratio=[1, 0.6]).size_px
    run = training(multi_aspect_ratio=[1, 0.6], rotary_pos_embed=True)
    assert run.size_px in {(128, 128), (96, 160), (160, 96)}


@pytest.mark.parametrize(
    ("changes", "said", "message"),
    [
        ({"video_mixer_rank": 3}, True, "has video_mixer_rank: 3, and this configuration video_mixer_rank: 0: write"),
        ({"video_mixer_rank": 3}, False, "have a mixer of rank 3: write video_mixer_rank: 3"),
        ({}, None, "holds no NOVA: mask_embed.bos_token is missing, and it has weight"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, changes, said, message):
    numbers, path = build.network_numbers(training().config) | changes, tmp_path / "a.safetensors"
    tensors = {"weight": torch.ones(1)} if said is None else NOVATransformer(**numbers).state_dict()
    save_file(tensors, path, {CONFIG_KEY: json.dumps(numbers)} if said else None)
    with pytest.raises(UserError, match=message):
        build.network(training(generator_checkpoint_path=str(path)).config)


def test_another_version_is_named(tmp_path):
    numbers = build.network_numbers(training(model_version="mini-video", num_frames=5).config)
    path = tmp_path / "a.safetensors"
    save_file(NOVATransformer(**numbers).state_dict(), path, {CONFIG_KEY: json.dumps(numbers)})
    with pytest.raises(UserError, match="is NOVA's mini-video; write model_version: mini-video"):
        training(generator_checkpoint_path=str(path)).begin(None)


def test_weights_for_another_size_are_of_their_version():
    numbers = {"image_size": [512, 512], "image_base_size": [32, 32], "video_base_size": [1, 16, 16]}
    assert version_of(dict(VERSIONS["d48w768-sdxl1024"].network) | numbers) == "d48w768-sdxl1024"
    assert [version_of(version.network) for version in VERSIONS.values()] == list(VERSIONS)


def test_clips_are_stretched_to_as_many_frames_as_their_weights_say(tmp_path):
    of_clips = {"model_version": "mini-video", "num_frames": 5, "image_size": 64}
    numbers = build.network_numbers(training(**of_clips).config, (64, 64)) | {"video_base_size": [9, 4, 4]}
    path = tmp_path / "a.safetensors"
    save_file(NOVATransformer(**numbers).state_dict(), path, {CONFIG_KEY: json.dumps(numbers)})
    run = training(generator_checkpoint_path=str(path), **of_clips)
    assert build.network(run.config, run.size_px).video_pos_embed.frames == 9
    assert json.loads(run.file_metadata()[CONFIG_KEY])["video_base_size"] == [9, 4, 4]


def test_a_training_begins_with_the_diffusion_of_its_folder(tmp_path):
    numbers = build.network_numbers(training().config)
    for part, name, said in (
        ("transformer", "config.json", numbers),
        ("scheduler", "scheduler_config.json", {"_class_name": "DDPMScheduler"}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text(json.dumps(said), encoding="utf-8")
    run = training(generator_checkpoint_path=str(tmp_path))
    run.begin(None)
    assert run.config.diffusion_target == "epsilon"
    given = {"generator_checkpoint_path": str(tmp_path), "diffusion_target": "rectified_flows"}
    with pytest.raises(ConfigError, match=r"rectified_flows contradicts .* predicts epsilon"):
        training(**given).begin(None)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"shift: the scheduler beside .* says 3: write that, or another number"):
        training(**given).begin(None)
    run = training(**given, shift=1)
    run.begin(None)
    assert run.config.shift == 1
