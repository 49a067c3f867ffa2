"""Exports of Stable Diffusion are read by diffusers, and give the same weights and pictures there."""

import errno
import json
import os
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from families.common.lora import adapters_of, add_adapters
from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats import Lora
from families.common.weight_files import metadata_of
from families.registry import family_of
from families.stable_diffusion import build
from families.stable_diffusion.components import find_component
from families.stable_diffusion.diffusers_folder import scheduler
from families.stable_diffusion.exports import ExportSettings, without_projection
from families.stable_diffusion.single_file import look_into
from modules.lora import LoraSettings
from tests.families.stable_diffusion.original_files import component_tensors, original_file
from tests.families.stable_diffusion.test_single_file import same
from tests.families.stable_diffusion.test_train_sd import settings_of, train
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from tests.modules.test_lora import randomised
from tools.export import main
from warpcore.config import make_config
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"
WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines with CLIP's vocabulary, which single files do not hold."""
    return {version: write(tmp_path_factory.mktemp(version), "clip") for version, write in WRITERS.items()}


@pytest.fixture
def export(monkeypatch):
    """Run `tools/export.py`."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        main()

    return run


def drawn(pipeline: diffusers.DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    return pipeline("a red cat", generator=generator, **settings).images


def opened(kind, place, folder: Path | None = None) -> diffusers.DiffusionPipeline:
    if folder is None:
        return kind.from_pretrained(place, local_files_only=True)
    return kind.from_single_file(place, config=str(folder), local_files_only=True)


@pytest.mark.integration
@pytest.mark.parametrize("version", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_single_file_is_that_of_the_original_programs_and_diffusers_draws_the_same_with_it(
    version, folders, export, tmp_path
):
    folder, file = folders[version], tmp_path / "model.safetensors"
    export("single-file", folder, file)
    expected = original_file(folder)
    expected.pop("conditioner.embedders.1.model.logit_scale", None)
    assert same(load_file(file), expected)
    kind = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[version]
    # Processors add up in another order where weights lie otherwise in memory: no equal bits.
    assert_close(drawn(opened(kind, file, folder)), drawn(opened(kind, folder)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.integration
def test_a_single_file_becomes_a_pipeline_of_diffusers(folders, export, tmp_path):
    save_file(original_file(folders["sdxl"]), tmp_path / "model.safetensors")
    # Of a file that does not say how its networks are built, they are the published ones: these say it.
    configs = {
        f"{name}_config": (folders["sdxl"] / name / "config.json").read_text()
        for name in component_tensors(folders["sdxl"])
    }
    save_file(original_file(folders["sdxl"]), tmp_path / "model.safetensors", configs)
    export("diffusers", tmp_path / "model.safetensors", tmp_path / "folder")
    for name, own in component_tensors(folders["sdxl"]).items():
        assert same(component_tensors(tmp_path / "folder")[name], own)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    kind = diffusers.StableDiffusionXLPipeline
    assert_close(drawn(opened(kind, tmp_path / "folder")), drawn(opened(kind, folders["sdxl"])), rtol=0, atol=1e-5)


def test_the_precision_of_an_export_is_that_which_is_asked_for(folders, export, tmp_path):
    for dtype in ("float16", "bfloat16"):
        export(
            "single-file",
            folders["sd15"],
            tmp_path / f"{dtype}.safetensors",
            f"export_dtype={dtype}",
            "only_unet=true",
        )
        kinds = {tensor.dtype for tensor in load_file(tmp_path / f"{dtype}.safetensors").values()}
        assert kinds == {getattr(torch, dtype)}
    large = load_file(folders["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    large["conv_in.bias"][0] = 1e6
    config = (folders["sd15"] / "unet" / "config.json").read_text()
    save_file(large, tmp_path / "large.safetensors", {"config": config})
    asked = ("export_dtype=float16", "only_unet=true")
    with pytest.raises(UserError, match=r"export_dtype: a U-Net: conv_in\.bias has numbers too large for float16"):
        export("single-file", tmp_path / "large.safetensors", tmp_path / "x.safetensors", *asked)
    assert not (tmp_path / "x.safetensors").exists()


def test_the_u_net_is_exported_by_itself(folders, export, tmp_path):
    expected = component_tensors(folders["sd15"])["unet"]
    export("single-file", folders["sd15"], tmp_path / "unet.safetensors", "only_unet=true")
    export("diffusers", folders["sd15"] / "unet", tmp_path / "unet", "only_unet=true")
    assert look_into(tmp_path / "unet.safetensors", KEY).components.keys() == {"unet"}
    assert same(find_component(tmp_path / "unet.safetensors", "unet", KEY).tensors(), expected)
    assert same(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict(), expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_is_full_for_a_folder_of_diffusers_is_named(folders, export, tmp_path, monkeypatch, number):
    def save_file(*_, **__):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        export("diffusers", folders["sd15"] / "unet", tmp_path / "unet", "only_unet=true")
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "unet"))


def settings(folder, **changes) -> ExportSettings:
    return make_config(ExportSettings, {KEY: str(folder)} | changes)


@pytest.mark.parametrize(("version", "changes", "kind", "expected"), [
    ("sd15", {}, "PNDMScheduler", {"prediction_type": "epsilon", "steps_offset": 1, "skip_prk_steps": True}),
    ("sd15", {"diffusion_target": "v"}, "PNDMScheduler", {"prediction_type": "v_prediction"}),
    ("sd15", {"diffusion_target": "v", "zero_terminal_snr": True}, "DDIMScheduler",
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("sd15", {"diffusion_target": "x0"}, "DDIMScheduler", {"prediction_type": "sample"}),
    ("sd15", {"diffusion_target": "rectified_flows"}, "UniPCMultistepScheduler", {"use_flow_sigmas": True}),
    ("sdxl", {}, "EulerDiscreteScheduler", {"prediction_type": "epsilon", "timestep_spacing": "leading"}),
    ("sdxl", {"diffusion_target": "v", "zero_terminal_snr": True}, "EulerDiscreteScheduler",
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
])  # fmt: skip
def test_the_scheduler_is_the_published_one_for_what_the_network_predicts(
    version, changes, kind, expected, folders, tmp_path
):
    made = scheduler(settings(folders[version], **changes))
    assert type(made).__name__ == kind
    assert expected.items() <= dict(made.config).items()
    made.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "unet").symlink_to(folders[version] / "unet")
    found = find_component(tmp_path / "unet", "unet", KEY)
    assert found.diffusion_target == changes.get("diffusion_target", "epsilon")
    assert found.zero_terminal_snr == changes.get("zero_terminal_snr", False)


@pytest.mark.parametrize("changes", [
    {"diffusion_target": "v", "zero_terminal_snr": True}, {"diffusion_target": "rectified_flows"}
])  # fmt: skip
@pytest.mark.integration
def test_diffusers_pipeline_draws_with_that_scheduler(changes, folders):
    pipeline = opened(diffusers.StableDiffusionPipeline, folders["sd15"])
    pipeline.scheduler = scheduler(settings(folders["sd15"], **changes))
    assert drawn(pipeline).isfinite().all()


def test_a_single_file_says_what_its_network_predicts(folders, export, tmp_path, capsys):
    marks = ("diffusion_target=v", "zero_terminal_snr=true", "only_unet=true")
    for version, folder in folders.items():
        file = tmp_path / f"{version}.safetensors"
        export("single-file", folder, file, *marks)
        contents = look_into(file, KEY)
        found = find_component(file, "unet", KEY)
        assert (found.version, found.diffusion_target, found.zero_terminal_snr) == (version, "v", True)
        assert ("v_pred" in load_file(file)) == (version == "sdxl")
        assert contents.metadata["modelspec.prediction_type"] == "v"
    assert capsys.readouterr().out.count("ComfyUI needs the node ModelSamplingDiscrete") == 1


# ---------------------------------------------------------------- runs


@pytest.mark.integration
def test_a_run_is_exported_with_what_stands_beside_its_u_net(folders, export, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    weights = component_tensors(folders["sdxl"])
    trained = {name: tensor + 1 for name, tensor in weights["unet"].items()}
    about = {
        "family": "stable_diffusion", "model_version": "sdxl", "diffusion_target": "v",
        "config": (folders["sdxl"] / "unet" / "config.json").read_text(),
    }  # fmt: skip
    save_file(trained, run / "generator.safetensors", about)
    text = {name: tensor + 1 for name, tensor in weights["text_encoder"].items()}
    second = {name: tensor + 2 for name, tensor in weights["text_encoder_2"].items()}
    for name, own in (("text_encoder", text), ("text_encoder_2", second)):
        config = (folders["sdxl"] / name / "config.json").read_text()
        save_file(own, run / f"{name}.safetensors", {"family": "stable_diffusion", "config": config})
    saved = {"model_version": "sdxl", "generator_checkpoint_path": str(folders["sdxl"]), "diffusion_target": "v"}
    (run / "config.yaml").write_text(json.dumps(saved))
    export("single-file", run, tmp_path / "run.safetensors")
    found = {name: find_component(tmp_path / "run.safetensors", name, KEY) for name in weights}
    expected = {"unet": trained, "vae": weights["vae"], "text_encoder": text, "text_encoder_2": second}
    for name, own in expected.items():
        assert same(found[name].tensors(), own), name
    assert found["unet"].diffusion_target == "v"


@pytest.mark.slow
@pytest.mark.integration
def test_what_a_run_trained_is_what_diffusers_loads(export, tmp_path):
    made = settings_of(tmp_path, "sd15")
    train(made)
    run = tmp_path / made["experiment_id"]
    trained = load_file(run / "generator.safetensors")
    export("diffusers", run, tmp_path / "folder")
    pipeline = opened(diffusers.StableDiffusionPipeline, tmp_path / "folder")
    assert same(pipeline.unet.state_dict(), trained)
    assert family_of(tmp_path / "folder").name == "stable_diffusion"
    before = component_tensors(tmp_path / "pipeline")
    assert not same(before["unet"], trained)
    assert same(pipeline.vae.state_dict(), before["vae"])
    assert same(pipeline.text_encoder.state_dict(), before["text_encoder"])


def test_the_mini_s_text_encoder_gives_the_same_states_without_its_projection():
    (encoder,) = build.text_encoders(make_config(ExportSettings, {"model_version": "mini"})).encoders
    theirs = without_projection(encoder.model)
    ids = encoder.tokenize(["a red circle"]).ids
    theirs.embeddings.position_ids = torch.arange(ids.shape[1])[None]
    torch.testing.assert_close(theirs(ids)[0], encoder(["a red circle"]).hidden, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- LoRA


def some_lora(folder: Path, seed: int = 3) -> tuple[torch.nn.Module, Lora]:
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    add_adapters(network, ["attn2.to_k", r"conv1$"], LoraSettings(rank=2, alpha=1))
    return network, Lora(adapters_of(randomised(network, seed)))


@pytest.mark.parametrize(("version", "kind"), [
    ("sd15", "diffusers"), ("sdxl", "kohya"),
    pytest.param("sd15", "kohya", marks=pytest.mark.slow), pytest.param("sdxl", "diffusers", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_lora_is_written_in_the_names_of_other_programs(version, kind, folders, export, tmp_path):
    network, lora = some_lora(folders[version])
    write_loras({"unet": lora}, tmp_path / "ours.safetensors", "warpcore", {"unet": network},
                {"family": "stable_diffusion", "model_version": version})  # fmt: skip
    place = f"generator_checkpoint_path={folders[version]}"
    export(f"lora-{kind}", tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", place)
    names = load_file(tmp_path / "theirs.safetensors").keys()
    assert all(name.startswith({"kohya": "lora_unet_", "diffusers": "unet."}[kind]) for name in names)
    assert any("input_blocks" in name for name in names) == (version == "sdxl" and kind == "kohya")
    plain = diffusers.UNet2DConditionModel.from_pretrained(folders[version] / "unet")
    back = read_loras(tmp_path / "theirs.safetensors", {"unet": plain})["unet"]
    assert back.adapters.keys() == lora.adapters.keys()
    for name, adapter in lora.adapters.items():
        assert torch.equal(back.adapters[name].down, adapter.down)
        assert back.adapters[name].scale == adapter.scale
    assert family_of(tmp_path / "theirs.safetensors").name == "stable_diffusion"
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        bare = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(bare, tmp_path / "bare.safetensors")  # as others write it, without our metadata
    assert family_of(tmp_path / "bare.safetensors").name == "stable_diffusion"


@pytest.mark.parametrize("form", ["lora-kohya", "lora-diffusers"])
def test_the_tokens_of_a_lora_become_embeddings_beside_it(form, folders, export, tmp_path):
    network, lora = some_lora(folders["sd15"])
    tokens = Lora({}, ["[dog]"], torch.zeros(1, 16), torch.ones(1, 16))
    own = {"unet": lora, "text_encoder": tokens}
    write_loras(own, tmp_path / "ours.safetensors", "warpcore", {"unet": network, "text_encoder": network})
    export(form, tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", f"{KEY}={folders['sd15']}")
    (embedding,) = load_file(tmp_path / "theirs_embeddings" / "dog.safetensors").values()
    assert torch.equal(embedding, torch.ones(1, 16))


def test_a_lora_says_kohyas_clip_skip(folders, export, tmp_path):
    """As `ss_clip_skip`, the name under which kohya's sd-scripts write it."""
    network, lora = some_lora(folders["sd15"])
    write_loras({"unet": lora}, tmp_path / "plain.safetensors", "warpcore", {"unet": network})
    save_file(load_file(tmp_path / "plain.safetensors"), tmp_path / "said.safetensors",
              metadata_of(tmp_path / "plain.safetensors") | {"clip_skip": "2"})  # fmt: skip
    for name, said in {"plain": None, "said": "2"}.items():
        export("lora-kohya", tmp_path / f"{name}.safetensors", tmp_path / f"{name}_kohya.safetensors",
               f"{KEY}={folders['sd15']}")  # fmt: skip
        found = metadata_of(tmp_path / f"{name}_kohya.safetensors")
        assert found.get("ss_clip_skip") == found.get("clip_skip") == said


def test_a_checkpoint_with_a_lora_in_it_has_the_weights_that_peft_merges(folders, export, tmp_path):
    network, lora = some_lora(folders["sd15"])
    write_loras({"unet": lora}, tmp_path / "pytorch_lora_weights.safetensors", "diffusers", {"unet": network})
    export("single-file", folders["sd15"], tmp_path / "merged.safetensors", "only_unet=true",
           f"lora={tmp_path / 'pytorch_lora_weights.safetensors'}:0.5")  # fmt: skip
    merged = find_component(tmp_path / "merged.safetensors", "unet", KEY).tensors()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd15"])
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(lora_scale=0.5)
    theirs.unload_lora_weights()
    for name, tensor in theirs.unet.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_exported_is_said(folders, export, tmp_path):
    network, lora = some_lora(folders["sd15"])
    write_loras({"unet": lora}, tmp_path / "lora.safetensors", "kohya", {"unet": network})
    with pytest.raises(UserError, match=r"lora\.safetensors looks like a LoRA; supported are Stable Diffusion 1\.x"):
        export("single-file", tmp_path / "lora.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "taken.safetensors").touch()
    with pytest.raises(UserError, match=r"taken\.safetensors is there already: name another file"):
        export("single-file", folders["sd15"], tmp_path / "taken.safetensors")
    with pytest.raises(UserError, match="autoencoder_checkpoint_path is missing, and generator_checkpoint_path"):
        export("diffusers", folders["sd15"] / "unet", tmp_path / "folder")
    with pytest.raises(UserError, match="holds no LoRA"):
        export("lora-kohya", folders["sd15"], tmp_path / "x.safetensors")
