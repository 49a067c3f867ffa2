"""Single files in the layout of A1111 and ComfyUI: what they hold, and what is refused with a message."""

import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.stable_diffusion.single_file import is_single_file, look_into, read_single_file
from tests.families.stable_diffusion.original_files import component_tensors, original_file
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"
WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """For each version the tensors of a tiny pipeline's networks, and of a single file made of them."""
    folders = {version: write(tmp_path_factory.mktemp(version)) for version, write in WRITERS.items()}
    return {version: (component_tensors(folder), original_file(folder)) for version, folder in folders.items()}


@pytest.fixture
def sd15(pipelines):
    return pipelines["sd15"][1]


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("version", WRITERS)
def test_every_component_returns_under_the_names_of_the_libraries(version, pipelines, tmp_path):
    expected, tensors = pipelines[version]
    save_file(tensors, tmp_path / "model.safetensors")
    contents = look_into(tmp_path / "model.safetensors", KEY)
    assert contents.version == version
    found = read_single_file(tmp_path / "model.safetensors", KEY)
    assert found.keys() == contents.components.keys() == expected.keys()
    for component, own in expected.items():
        assert same(found[component], own), component


def test_only_the_wanted_components_are_read(pipelines, tmp_path):
    expected, tensors = pipelines["sdxl"]
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_single_file(tmp_path / "model.safetensors", KEY, ["text_encoder_2", "vae"])
    assert found.keys() == {"vae", "text_encoder_2"}
    assert same(found["vae"], expected["vae"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_of_tensors_is_read(zipped, pipelines, tmp_path):
    expected, tensors = pipelines["sd15"]
    state = {"state_dict": tensors, "global_step": 7}
    torch.save(state, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_single_file(tmp_path / "model.ckpt", KEY)
    assert all(same(found[component], own) for component, own in expected.items())


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path(WITNESS).touch()".replace("WITNESS", repr(str(self.witness))),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_code_is_refused_and_not_run(zipped, sd15, tmp_path):
    Code.witness = tmp_path / "it ran"
    torch.save({"state_dict": sd15, "x": Code()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError,
        match=rf"^{KEY}: .*a\.ckpt cannot be read: .* holds code .*exec\), .* never run; .*\.safetensors",
    ):
        read_single_file(tmp_path / "a.ckpt", KEY)
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"x": Code()}, protocol=2))
    with pytest.raises(UserError, match="never run"):
        look_into(tmp_path / "b.ckpt", KEY)
    assert not Code.witness.exists()


def test_the_u_net_or_the_autoencoder_alone_needs_no_prefix(pipelines, tmp_path):
    expected, tensors = pipelines["sd15"]
    for component, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        save_file(own, tmp_path / f"{component}.safetensors")
        found = read_single_file(tmp_path / f"{component}.safetensors", KEY)
        assert found.keys() == {component}
        assert same(found[component], expected[component])
        assert is_single_file(own)
        assert not is_single_file(expected[component])
    assert look_into(tmp_path / "vae.safetensors", KEY).version is None


def test_what_old_files_call_otherwise_is_read(pipelines, tmp_path):
    """Text encoders without `text_model.`, and autoencoders whose attention has matrices."""
    expected, tensors = pipelines["sd15"]
    old = {
        name.replace("former.text_model.", "former."): t[:, :, 0, 0] if "attn_1" in name and t.dim() > 1 else t
        for name, t in tensors.items()
    }  # fmt: skip
    save_file({name: t.contiguous() for name, t in old.items()}, tmp_path / "old.safetensors")
    found = read_single_file(tmp_path / "old.safetensors", KEY)
    assert all(same(found[component], own) for component, own in expected.items())


def test_what_is_not_read_is_said(pipelines, sd15, tmp_path, caplog):
    expected, _ = pipelines["sd15"]
    quiet = {
        "betas": torch.ones(3), "sqrt_one_minus_alphas_cumprod": torch.ones(3), "posterior_mean_coef1": torch.ones(3),
        "sqrt_recipm1_alphas_cumprod": torch.ones(3), "log_one_minus_alphas_cumprod": torch.ones(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }  # fmt: skip
    save_file(sd15 | quiet, tmp_path / "quiet.safetensors")
    with caplog.at_level(logging.INFO):
        found = read_single_file(tmp_path / "quiet.safetensors", KEY)
    assert not caplog.records
    assert all(same(found[component], own) for component, own in expected.items())

    others = {
        "model_ema.decay": torch.ones(()),
        "cond_stage_model.logit_scale": torch.ones(()),
        "mystery": torch.ones(1),
    }
    save_file(sd15 | others, tmp_path / "loud.safetensors")
    read_single_file(tmp_path / "loud.safetensors", KEY)
    averaged, unknown = (record.getMessage() for record in caplog.records)
    assert "averaged weights too (model_ema), which are not read" in averaged
    assert "1 tensors of" in unknown
    assert unknown.endswith("such as mystery")


def test_a_file_says_what_its_network_predicts(sd15, tmp_path):
    for number, (extra, metadata, target, zero_snr) in enumerate((
        ({}, None, None, False),
        ({"v_pred": torch.tensor([])}, None, "v", False),
        ({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, None, "v", True),
        ({}, {"modelspec.prediction_type": "v"}, "v", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ({}, {"diffusion_target": "v"}, "v", False),
    )):  # fmt: skip
        save_file(sd15 | extra, tmp_path / f"{number}.safetensors", metadata)
        contents = look_into(tmp_path / f"{number}.safetensors", KEY)
        assert (contents.diffusion_target, contents.zero_terminal_snr) == (target, zero_snr)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LINEAR = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
OTHERS = {
    "an inpainting model (its U-Net sees 9 channels, not 4)": {FIRST: torch.zeros(8, 9, 3, 3)},
    "InstructPix2Pix (its U-Net sees 8 channels, not 4)": {FIRST: torch.zeros(8, 8, 3, 3)},
    "Stable Diffusion 2.x": {LINEAR: torch.zeros(8, 8)},
    "Stable Diffusion 2.x;": {"cond_stage_model.model.ln_final.weight": torch.zeros(3)},
    "SDXL's refiner": {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(3)},
    "SDXL with EDM's noise levels": {"edm_mean": torch.zeros(4)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": torch.zeros(3)},
    "a model of video": {"model.diffusion_model.input_blocks.1.1.time_stack.0.ff.weight": torch.zeros(3)},
    "a LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_architecture_is_named(what, sd15, tmp_path):
    save_file(sd15 | OTHERS[what], tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        read_single_file(tmp_path / "other.safetensors", KEY)
    assert f"{KEY}: {tmp_path / 'other.safetensors'} looks like {what}" in str(error.value)
    assert "supported are Stable Diffusion 1.x (sd15) and SDXL (sdxl)" in str(error.value)


@pytest.mark.parametrize(("what", "name"), [
    ("Stable Diffusion 3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    ("FLUX", "double_blocks.0.img_attn.qkv.weight"),
    ("Stable Cascade", "clip_txt_mapper.weight"),
    ("Stage A of Stable Cascade", "down_blocks.0.channelwise.0.weight"),
    ("a LoRA", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
    ("a LoRA", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    ("a U-Net in diffusers' names", "down_blocks.0.resnets.0.norm1.weight"),
    ("an autoencoder in diffusers' names", "encoder.mid_block.resnets.0.norm1.weight"),
    ("a text encoder by itself", "text_model.final_layer_norm.weight"),
    ("an embedding (textual inversion)", "clip_l"),
    ("nothing that is known here (it holds x)", "x"),
])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_named(what, name, tmp_path):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors looks like") as error:
        look_into(tmp_path / "other.safetensors", KEY)
    assert f"looks like {what};" in str(error.value)


def test_a_file_that_is_not_whole_is_an_error(sd15, tmp_path):
    save_file(sd15, tmp_path / "whole.safetensors")
    torch.save(sd15, tmp_path / "whole.ckpt")
    for kind in ("safetensors", "ckpt"):
        content = (tmp_path / f"whole.{kind}").read_bytes()
        for length in (0, 5, len(content) // 2, len(content) - 1):
            (tmp_path / f"cut.{kind}").write_bytes(content[:length])
            with pytest.raises(UserError, match=rf"^{KEY}: .*cut\.{kind} (cannot be read: it )?is damaged"):
                read_single_file(tmp_path / f"cut.{kind}", KEY)
    with pytest.raises(UserError, match=rf"{KEY}: .*none.safetensors does not exist"):
        look_into(tmp_path / "none.safetensors", KEY)
    strange = load_file(tmp_path / "whole.safetensors") | {"model.diffusion_model.scaled": torch.zeros(1)}
    save_file(strange, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match=r"strange\.safetensors cannot be read as unet .*: scaled is no layer"):
        read_single_file(tmp_path / "strange.safetensors", KEY)
