"""Networks are found in everything that a config may name, and what is something else is refused with a message."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from families.stable_diffusion import build
from families.stable_diffusion.components import find_component, holds
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.versions import VERSIONS
from tests.bounds import bounded
from tests.families.stable_diffusion.original_files import component_tensors, original_file
from tests.families.stable_diffusion.test_single_file import same
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"
WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {version: write(tmp_path_factory.mktemp(version)) for version, write in WRITERS.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A pipeline of Stable Diffusion 1.5 that a test may change."""
    return shutil.copytree(folders["sd15"], tmp_path / "copy")


def networks(version: str) -> list[str]:
    return ["unet", "vae", "text_encoder", *(["text_encoder_2"] if version == "sdxl" else [])]


@pytest.mark.parametrize("version", WRITERS)
def test_a_pipeline_a_network_s_folder_and_a_single_file_give_the_same_weights(version, folders, tmp_path):
    folder, expected = folders[version], component_tensors(folders[version])
    save_file(original_file(folder), tmp_path / "single.safetensors")
    for name in networks(version):
        in_pipeline = find_component(folder, name, KEY)
        alone = find_component(folder / name, name, KEY)
        in_file = find_component(tmp_path / "single.safetensors", name, KEY)
        assert in_pipeline.config == alone.config == json.loads((folder / name / "config.json").read_text())
        assert all(same(found.tensors(), expected[name]) for found in (in_pipeline, alone, in_file))
        assert holds(folder, name, KEY)
        assert holds(tmp_path / "single.safetensors", name, KEY)
        assert not holds(folder / name, name, KEY)
        if name.startswith("text_encoder"):
            assert in_pipeline.tokenizer == alone.tokenizer == folder / name.replace("text_encoder", "tokenizer")
    assert find_component(folder, "unet", KEY).version == version
    assert find_component(tmp_path / "single.safetensors", "vae", KEY).version == version
    if version == "sd15":
        assert not holds(folder, "text_encoder_2", KEY)
        assert not holds(tmp_path / "single.safetensors", "text_encoder_2", KEY)


def test_weights_in_half_precision_and_in_several_files_are_found(copy):
    unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet").half()
    expected = dict(unet.state_dict())
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((copy / "unet").glob("*.fp16*.safetensors"))) > 1
    assert same(find_component(copy, "unet", KEY).tensors(), expected)


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, ("epsilon", False)),
    ({"prediction_type": "v_prediction"}, ("v", False)),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", True)),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ("rectified_flows", False)),
])  # fmt: skip
def test_a_pipeline_s_scheduler_says_what_the_network_predicts(settings, expected, copy):
    edit(copy / "scheduler" / "scheduler_config.json", settings)
    found = find_component(copy, "unet", KEY)
    assert (found.diffusion_target, found.zero_terminal_snr) == expected
    assert find_component(copy / "vae", "vae", KEY).diffusion_target is None


def test_another_noise_schedule_is_said(copy, caplog):
    edit(copy / "scheduler" / "scheduler_config.json", {"beta_schedule": "linear"})
    find_component(copy, "unet", KEY)
    assert "has the noise schedule {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'linear'" in caplog.text


def test_a_file_of_a_run_says_how_it_is_built_and_what_it_predicts(folders, tmp_path):
    weights = load_file(folders["sdxl"] / "unet" / "diffusion_pytorch_model.safetensors")
    config = (folders["sdxl"] / "unet" / "config.json").read_text()
    about = {"config": config, "diffusion_target": "v", "zero_terminal_snr": "true"}
    save_file(weights, tmp_path / "generator.safetensors", about)
    found = find_component(tmp_path / "generator.safetensors", "unet", KEY)
    assert same(found.tensors(), weights)
    assert found.config == json.loads(config)
    assert (found.version, found.diffusion_target, found.zero_terminal_snr) == ("sdxl", "v", True)
    assert not holds(tmp_path / "generator.safetensors", "vae", KEY)
    save_file(weights, tmp_path / "bare.safetensors")
    assert find_component(tmp_path / "bare.safetensors", "unet", KEY).config is None


# ---------------------------------------------------------------- bad input


def edit(file, changes: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_that_is_no_pipeline_is_named_with_what_it_holds(folders, copy, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    with pytest.raises(UserError, match=rf"^{KEY}: .*pictures is no folder of diffusers: it holds a\.png\. Name"):
        find_component(tmp_path / "pictures", "unet", KEY)
    shutil.rmtree(copy / "unet")
    with pytest.raises(UserError, match="copy is a pipeline without unet: it holds model_index"):
        find_component(copy, "unet", KEY)
    with pytest.raises(UserError, match=r"unet holds UNet2DConditionModel, not an autoencoder \(AutoencoderKL\)"):
        find_component(folders["sd15"] / "unet", "vae", KEY)
    with pytest.raises(UserError, match="does not exist"):
        find_component(tmp_path / "nowhere", "unet", KEY)


@pytest.mark.parametrize(("pipeline", "network", "changes", "message"), [
    (True, None, {"_class_name": "StableDiffusion3Pipeline"}, "holds a StableDiffusion3Pipeline; supported are"),
    (True, None, {"_class_name": "StableCascadePriorPipeline"}, "holds a StableCascadePriorPipeline"),
    (True, None, {"requires_aesthetics_score": True}, "holds SDXL's refiner; supported are"),
    (False, "unet", {"use_linear_projection": True}, "unet is that of Stable Diffusion 2.x; supported are"),
    (False, "unet", {"in_channels": 9}, r"the U-Net in .*unet sees 9 channels and predicts 4, as inpainting"),
    (False, "unet", {"_class_name": "PixArtTransformer2DModel"}, "holds PixArtTransformer2DModel, not a U-Net"),
    (False, "scheduler", {"prediction_type": "noise"}, "prediction_type is noise, not one of epsilon, sample"),
])  # fmt: skip
def test_a_folder_of_another_architecture_is_refused(pipeline, network, changes, message, copy):
    file = "model_index.json" if pipeline else f"{network}/config.json"
    edit(copy / (file if network != "scheduler" else "scheduler/scheduler_config.json"), changes)
    with pytest.raises(UserError, match=rf"^{KEY}: .*{message}"):
        find_component(copy, "unet", KEY)


def test_a_file_of_another_network_is_refused(folders, tmp_path):
    parts = component_tensors(folders["sdxl"])
    files = {name: tmp_path / f"{name}.safetensors" for name in parts}
    for name, file in files.items():
        save_file(parts[name], file)
    with pytest.raises(UserError, match=r"vae\.safetensors holds the weights of an autoencoder, not of a U-Net"):
        find_component(files["vae"], "unet", KEY)
    with pytest.raises(UserError, match="holds the weights of a second text encoder, not of an autoencoder"):
        find_component(files["text_encoder_2"], "vae", KEY)
    lora = {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=rf"^{KEY}: .*lora\.safetensors looks like a LoRA; supported are"):
        find_component(tmp_path / "lora.safetensors", "unet", KEY)
    save_file(original_file(folders["sd15"]), tmp_path / "single.safetensors")
    with pytest.raises(UserError, match=r"single\.safetensors does not hold a second text encoder, but a U-Net, an"):
        find_component(tmp_path / "single.safetensors", "text_encoder_2", KEY)
    (tmp_path / "cut.safetensors").write_bytes(files["unet"].read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{KEY}: .*cut\.safetensors cannot be read as weights"):
        find_component(tmp_path / "cut.safetensors", "unet", KEY)


@pytest.mark.parametrize(("network", "changes", "make", "message"), [
    ("unet", {"layers_per_block": "x"}, build.unet, f"{KEY}: its config is none of UNet2D"),
    ("unet", {"block_out_channels": None}, build.unet, "its config is none of UNet2DConditionModel"),
    ("vae", {"scaling_factor": "x"}, build.autoencoder, "scaling_factor in the autoencoder's config is 'x'"),
    ("unet", {"layers_per_block": 10**9}, build.unet, r"none of UNet2D.*: layers_per_block is 1000000000"),
    ("unet", {"transformer_layers_per_block": [1, [10**9]]}, build.unet, "transformer_layers_per_block is "),
    ("unet", {"block_out_channels": [8] * 5000}, build.unet, "block_out_channels is "),
    ("unet", {"cross_attention_dim": 2**62}, build.unet, "its config is none of UNet2D"),
    ("unet", {"norm_num_groups": 0}, build.unet, "its config is none of UNet2D"),
    ("unet", {"in_channels": [4] * 99}, build.unet, r"sees \[4, .*\] channels and predicts 4"),
    ("vae", {"latents_mean": 3}, build.latents_of, "latents_mean or shift_factor in the autoencoder's config is 3"),
    ("vae", {"latents_mean": ["0"] * 4}, build.latents_of, r"is \['0', '0', '0', '0'\]; write a number, or"),
    ("vae", {"shift_factor": {}, "latents_mean": [1, 2]}, build.latents_of, "for each of the 4 channels"),
    ("vae", {"latents_std": [0.0]}, build.latents_of, r"latents_std .* is \[0.0\]; .*, above 0"),
    ("vae", {"latents_std": [10**400]}, build.latents_of, "latents_std in the autoencoder's config is"),
    ("vae", {"scaling_factor": [1]}, build.latents_of, r"scaling_factor in the autoencoder's config is \[1\]"),
    ("vae", {"block_out_channels": 3}, build.latents_of, "block_out_channels in the autoencoder's config is 3"),
    ("vae", {"block_out_channels": []}, build.latents_of, r"block_out_channels in the autoencoder's config is \[\]"),
    ("vae", {"latent_channels": "4"}, build.autoencoder, "have '4' channels, and the U-Net reads 4"),
    ("text_encoder", {"hidden_size": "x"}, build.text_encoders, "text_encoder_checkpoint_path: its config is none of"),
    ("text_encoder", {"num_hidden_layers": 10**9}, build.text_encoders, "num_hidden_layers is 1000000000"),
    ("text_encoder", {"max_position_embeddings": -3}, build.text_encoders, "its config is none of CLIPTextModel"),
    ("text_encoder", {"architectures": 3, "hidden_act": "no"}, build.text_encoders, "its config is none of CLIPText"),
    ("text_encoder", {"architectures": [3, {}], "vocab_size": 2**62}, build.text_encoders, "its config is none of"),
])  # fmt: skip
def test_a_config_with_wrong_numbers_is_an_error(network, changes, make, message, copy):
    edit(copy / network / "config.json", changes)
    with bounded(copy), pytest.raises(UserError, match=message):
        make(SdSettings(generator_checkpoint_path=copy))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error(content, copy):
    (copy / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"text_encoder_checkpoint_path: the tokenizer in .*tokenizer cannot be read"):
        build.text_encoders(SdSettings(generator_checkpoint_path=copy))


def test_a_config_that_cannot_be_read_is_an_error(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"the config of .*unet cannot be read"):
        find_component(copy, "unet", KEY)
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model_index\.json is no JSON object"):
        find_component(copy, "unet", KEY)


def test_networks_that_were_not_trained_together_are_named(folders):
    wide = SdSettings(
        generator_checkpoint_path=folders["sd15"], text_encoder_checkpoint_path=folders["sdxl"] / "text_encoder_2"
    )
    with pytest.raises(UserError, match=r"text_encoder_checkpoint_path: .* are 24 wide, and the U-Net reads 16: name"):
        build.text_encoders(wide)
    deep = SdSettings(
        generator_checkpoint_path=folders["sd15"], autoencoder_checkpoint_path=VERSIONS["mini"].autoencoder_file
    )
    with pytest.raises(
        UserError, match=r"autoencoder_checkpoint_path: .* have 16 channels, and the U-Net reads 4: name"
    ):
        build.autoencoder(deep)
