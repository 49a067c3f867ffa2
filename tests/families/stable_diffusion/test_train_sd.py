"""Stable Diffusion trains on a pipeline of diffusers, and its exported U-Net loads there."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from families.common.weight_files import read_header
from families.registry import family_of
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
PIPELINES = {"sd15": write_sd15, "sdxl": write_sdxl}


def settings_of(folder, version, **changes) -> dict:
    pipeline = folder / "pipeline"
    settings = tiny_settings(
        folder, write_shard(folder / "a.tar", 4, (64, 64)), updates=1, save_every=1, image_size=64, sample_steps=2,
        sample_count=2, model_version=version,
        generator_checkpoint_path=str(pipeline if pipeline.exists() else PIPELINES[version](pipeline)),
    )  # fmt: skip
    return {key: value for key, value in settings.items() if key in TrainSd.Config.model_fields} | changes


def train(settings) -> list[dict]:
    assert TrainSd(make_config(TrainSd.Config, settings)).run() == 0
    return read_metrics(settings)


@pytest.mark.parametrize("version", PIPELINES)
def test_the_exported_unet_is_the_library_s(tmp_path, version):
    settings = settings_of(tmp_path, version)
    train(settings)
    run = tmp_path / settings["experiment_id"]
    tensors = load_file(run / "generator.safetensors")
    before = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    theirs = UNet2DConditionModel.from_config(json.loads((tmp_path / "pipeline/unet/config.json").read_text()))
    theirs.load_state_dict(tensors, strict=True)
    assert any(not torch.equal(tensor, tensors[name]) for name, tensor in before.state_dict().items())
    assert family_of(run).name == family_of(run / "generator.safetensors").name == "stable_diffusion"
    assert (run / "samples").is_dir()


def test_a_run_starts_from_the_unet_of_another(tmp_path):
    first = settings_of(tmp_path, "sdxl")
    train(first)
    exported = tmp_path / first["experiment_id"] / "generator.safetensors"
    parts = {
        key: str(tmp_path / "pipeline") for key in ("autoencoder_checkpoint_path", "text_encoder_checkpoint_path")
    }
    again = settings_of(tmp_path, "sdxl", experiment_id="again", generator_checkpoint_path=str(exported), **parts)
    assert train(again)[0]["loss"] is not None


def test_weights_of_another_version_are_named(tmp_path):
    settings = settings_of(tmp_path, "sdxl", model_version="sd15")
    with pytest.raises(UserError, match="is SDXL; write model_version: sdxl"):
        TrainSd(make_config(TrainSd.Config, settings)).run()


def test_a_unet_alone_wants_the_other_networks(tmp_path):
    settings = settings_of(tmp_path, "sd15", generator_checkpoint_path=str(tmp_path / "pipeline" / "unet"))
    with pytest.raises(
        UserError,
        match=r"autoencoder_checkpoint_path is missing, and generator_checkpoint_path .* holds none: name a pipeline",
    ):
        TrainSd(make_config(TrainSd.Config, settings)).run()


def test_what_a_pipeline_says_of_its_target_is_obeyed(tmp_path):
    pipeline = write_sdxl(tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    settings = settings_of(tmp_path, "sdxl", generator_checkpoint_path=str(pipeline))
    case = TrainSd(make_config(TrainSd.Config, settings))
    assert case.run() == 0
    about = read_header(tmp_path / settings["experiment_id"] / "generator.safetensors").metadata
    assert (about["diffusion_target"], about["zero_terminal_snr"]) == ("v", "true")
    for wrong, key in (
        ({"diffusion_target": "epsilon"}, "diffusion_target"),
        ({"zero_terminal_snr": False}, "zero_t"),
    ):
        given = settings | {"experiment_id": "other"} | wrong
        with pytest.raises(UserError, match=f"{key}.*contradicts"):
            TrainSd(make_config(TrainSd.Config, given)).run()
