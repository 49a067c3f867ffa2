"""Stable Diffusion trains on a pipeline of diffusers, and its exported U-Net loads there."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from families.common.weight_files import read_header
from families.registry import family_of
from families.stable_diffusion import build
from families.stable_diffusion.components import find_component
from families.stable_diffusion.inference import SdInferenceSettings
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from tests.tiers import represented_by
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


@pytest.mark.parametrize("version", represented_by("sdxl", of=PIPELINES))
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


def test_more_sampling_steps_than_timesteps_are_refused_before_training(tmp_path):
    settings = settings_of(tmp_path, "sd15", sample_steps=1001)
    with pytest.raises(UserError, match="sampling steps: 1001 of 1000 timesteps"):
        TrainSd(make_config(TrainSd.Config, settings)).run()
    assert not (tmp_path / settings["experiment_id"] / "state").exists()
    assert not (tmp_path / settings["experiment_id"] / "metrics.jsonl").exists()


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


def test_text_encoders_are_trained_each_with_its_own_learning_rate(tmp_path):
    write_sdxl(tmp_path / "pipeline", vocabulary="clip")  # which a file of a text encoder, without tokenizer, is for
    settings = settings_of(tmp_path, "sdxl", train_text_encoder=True, text_encoder_lr=[1e-3, 1e-4], lr=1e-2)
    train(settings)
    run, pipeline = tmp_path / settings["experiment_id"], tmp_path / "pipeline"
    changes = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        before = kind.from_pretrained(pipeline / name)
        ours = find_component(run / "text_encoder.safetensors", name, "key")
        after = kind(CLIPTextConfig(**ours.config))
        after.load_state_dict(ours.tensors(), strict=True)
        tensors = before.state_dict()
        changes.append(max((tensor - tensors[key]).abs().max().item() for key, tensor in after.state_dict().items()))
        assert (run / f"{name}_ema.safetensors").is_file()
        drawn_with = build.text_encoders(SdInferenceSettings(run=[run])).encoders[name.endswith("2")].model
        averages = load_file(run / f"{name}_ema.safetensors")
        assert all(torch.equal(tensor, averages[key]) for key, tensor in drawn_with.state_dict().items())
    assert changes == pytest.approx([1e-3, 1e-4], rel=0.05)


def test_captions_that_are_cut_off_are_counted_at_the_start(tmp_path, capfd):
    data = write_shard(tmp_path / "long" / "a.tar", 4, (64, 64))
    getter = ["txt", "lambda t: t * 80"]
    train(settings_of(tmp_path, "sd15", webdataset_path=str(data), captions_getter=getter))
    assert "4 of 4 captions are longer than the 77 tokens that the text encoder reads" in " ".join(
        capfd.readouterr().err.split()
    )


def test_pictures_of_one_given_size_are_trained_and_drawn(tmp_path):
    data = str(write_shard(tmp_path / "wide" / "a.tar", 4, (80, 160)))
    settings = settings_of(tmp_path, "sd15", webdataset_path=data, image_size="64x128", sample_prompts=["a"])
    assert train(settings)
    (sheet,) = (tmp_path / settings["experiment_id"] / "samples").rglob("*.png")
    assert Image.open(sheet).height >= 128
    for wrong, told in (
        ({"image_size": "60x128"}, "write 64x128"),
        ({"multi_aspect_ratio": [1, 2]}, "remove multi_asp"),
    ):
        with pytest.raises(UserError, match=told):
            TrainSd(make_config(TrainSd.Config, settings | {"experiment_id": "other"} | wrong)).run()


def test_sdxl_s_autoencoder_computes_in_float32_in_a_run_of_float16_which_says_so_once(tmp_path, capfd):
    settings = settings_of(tmp_path, "sdxl", dtype="float16", updates=1)
    run = TrainSd(make_config(TrainSd.Config, settings))
    run.setup()
    assert {p.dtype for p in run.networks["autoencoder"].to(torch.float16).parameters()} == {torch.float32}
    run.close()
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("float16 is not for the autoencoder, which computes in float32 (autoencoder_precision)") == 1
    with pytest.raises(UserError, match="overflows in float16"):
        TrainSd(make_config(TrainSd.Config, settings | {"autoencoder_precision": "float16"})).run()


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    settings = settings_of(tmp_path, "sd15")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"generator_checkpoint_path: .*pictures"):
        TrainSd(
            make_config(TrainSd.Config, settings | {"generator_checkpoint_path": str(tmp_path / "pictures")})
        ).run()


def test_layers_by_name_alone_are_trained(tmp_path):
    groups = [{"pattern": "*.attn2.*", "lr_scale": 0.5}, {"pattern": "*", "frozen": True}]
    settings = settings_of(tmp_path, "sd15", parameter_groups=groups)
    train(settings)
    before = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / settings["experiment_id"] / "generator.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
