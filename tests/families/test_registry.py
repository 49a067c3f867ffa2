"""The registry finds families by their folders, and the family of a run, a file, a folder and of arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import registry
from families.cascade import build
from families.cascade.config import ModelSettings
from families.common.family import RECONSTRUCTION, TEXT_TO_IMAGE
from warpcore.errors import UserError
from warpcore.meta import only_shapes

ROOT = Path(__file__).parents[2]
HEAVY = ["diffusers", "transformers", "peft", "open_clip", "kornia"]


def written(path: Path, names, **metadata: str) -> Path:
    save_file({name: torch.zeros(1) for name in names}, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def networks():
    """The tensor names of the published cascade's networks."""
    settings = ModelSettings(model_version="3.6B")
    with only_shapes():
        made = {
            name: getattr(build, name)(settings) for name in ("stage_c", "stage_b", "stage_a", "encoder", "previewer")
        }
    return {name: list(network.state_dict()) for name, network in made.items()}


def test_a_run_that_has_saved_nothing_yet_is_told_so(tmp_path):
    (tmp_path / "config.yaml").write_text("model_version: mini\nnum_classes: 2\nclass_getter: [cls, identity]\n")
    with pytest.raises(UserError, match="is a run that has exported no weights yet: start it again, or name another"):
        registry.family_of(tmp_path)


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "stage_a", "encoder", "previewer"])
def test_published_weights_are_known_by_their_tensors(networks, name, tmp_path):
    assert registry.family_of(written(tmp_path / "published.safetensors", networks[name])).name == "cascade"


def test_a_run_is_known_by_its_config_and_by_its_weights(networks, tmp_path):
    (tmp_path / "config.yaml").write_text("model_version: mini\n")
    assert registry.family_of(tmp_path).name == "cascade"
    (tmp_path / "config.yaml").write_text("batch_size: 8\n")
    with pytest.raises(
        UserError, match=r"a training run of no family that is known here \(Stable Cascade, .*, Stable Diffusion.*\)"
    ):
        registry.family_of(tmp_path)
    written(tmp_path / "text_tower.safetensors", ["ln_final.bias"], clip_settings="{}")
    assert registry.family_of(tmp_path).name == "cascade"


def test_a_model_folder_is_known_by_its_index(tmp_path):
    (tmp_path / "prior").mkdir()
    index = tmp_path / "prior" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableCascadePriorPipeline"}))
    assert registry.family_of(tmp_path).name == registry.family_of(tmp_path / "prior").name == "cascade"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="of no family that is known here"):
        registry.family_of(tmp_path)


LORAS = {
    "cascade": [
        "lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight",
        "lora_prior_unet_up_blocks_0_2_attention_attn_in_proj_0.lora_down.weight",
        "unet.down_blocks.0.2.attention.attn.in_proj.0.lora_down.weight",
        "base_model.model.down_blocks.0.2.attention.to_q.lora_A.weight",
        "down_blocks.0.2.attention.attn.out_proj.lora.down", "weights.0.lora_down",
    ],
    "stable_diffusion": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "lora_unet_mid_block_attentions_0_proj_in.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "base_model.model.down_blocks.0.resnets.0.conv1.lora_A.weight",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in LORAS.items() for name in names])
def test_a_lora_of_any_program_is_known_by_its_names(family, name, tmp_path):
    assert registry.family_of(written(tmp_path / "lora.safetensors", [name])).name == family
    if name.startswith("base_model"):
        (tmp_path / "folder").mkdir()
        written(tmp_path / "folder" / "adapter_model.safetensors", [name])
        assert registry.family_of(tmp_path / "folder").name == family


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel"])
def test_folders_of_stable_diffusion_are_known(kind, tmp_path):
    index = tmp_path / ("config.json" if kind.startswith("UNet") else "model_index.json")
    index.write_text(json.dumps({"_class_name": kind}))
    assert registry.family_of(tmp_path).name == "stable_diffusion"


def test_a_pipeline_s_index_counts_more_than_its_parts(tmp_path):
    """Pipelines of many families have this autoencoder."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert registry.family_of(tmp_path).name == "stable_diffusion"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(UserError, match="of no family that is known here"):
        registry.family_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "9" * 5000])
def test_an_index_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON: .{,200}$"):
        registry.family_of(tmp_path)


def test_metadata_that_names_a_family_counts_more_than_tensors(networks, tmp_path):
    file = written(tmp_path / "c.safetensors", networks["stage_c"], family="another")
    with pytest.raises(UserError, match="is a file of no family"):
        registry.family_of(file)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        registry.family_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder without config"):
        registry.family_of(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read as weights"):
        registry.family_of(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "prompts=x",
            r"do not tell which family is meant \(Stable Cascade, .*, Stable Diffusion.*\); name a run \(run=FOLDER",
        ),
        ("prompts=x generator_checkpoint_path=gone.safetensors", r"gone\.safetensors does not exist; name a run"),
        ("prompts=x run=gone", r"^run: gone does not exist; name a run"),
        ("prompts=x promts=y", "no family has the key promts; did you mean prompts"),
        ("prompts=x num_inference_steps=9", "no family has the key num_inference_steps; did you mean steps"),
        (
            "prompts=x stage_b_steps=3 karras=true",
            "Stable Cascade has no karras; .*; Stable Diffusion has no stage_b_steps",
        ),
        ("prompts=x sampler=eulr", "Stable Cascade has no sampler eulr; .*; Stable Diffusion has no sampler eulr"),
    ],
)
def test_arguments_that_tell_no_family(arguments, message):
    with pytest.raises(UserError, match=message):
        registry.load_task(TEXT_TO_IMAGE, arguments.split())


@pytest.mark.parametrize(("version", "message"), [("sdxl", "weights of the U-Net"), ("1B", "weights of Stage C")])
def test_a_value_that_one_family_knows_tells_it(version, message):
    with pytest.raises(UserError, match=message):
        registry.load_task(TEXT_TO_IMAGE, [f"model_version={version}", "prompts=x"])


def test_weights_of_two_families_are_refused(networks, tmp_path):
    cascade = written(tmp_path / "c.safetensors", networks["stage_c"])
    other = written(tmp_path / "sd.safetensors", ["model.diffusion_model.input_blocks.0.0.weight"])
    with pytest.raises(
        UserError, match=r"of several families: .*c\.safetensors is of Stable Cascade, .* is of Stable D"
    ):
        registry.load_task(
            TEXT_TO_IMAGE, [f"generator_checkpoint_path={cascade}", f"autoencoder_checkpoint_path={other}"]
        )


def test_pickled_weights_are_known_and_their_code_is_not_run(tmp_path):
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}}, tmp_path / "a.ckpt")
    assert registry.family_of(tmp_path / "a.ckpt").name == "stable_diffusion"
    torch.save({"a": Path("x")}, tmp_path / "b.ckpt")
    with pytest.raises(
        UserError, match=r"b\.ckpt cannot be read as weights: .* holds code beside tensors .*, which is never run"
    ):
        registry.family_of(tmp_path / "b.ckpt")


def test_a_name_of_the_hub_is_downloaded_to_tell_its_family(monkeypatch, tmp_path):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    asked = []
    monkeypatch.setattr(registry, "local_weights", lambda path, key: asked.append((str(path), key)) or folder)
    able = [family for family in registry.families() if family.task(TEXT_TO_IMAGE)]
    values = {"generator_checkpoint_path": "owner/name", "prompts": ["x"]}
    assert [family.name for family in registry._owners(able, TEXT_TO_IMAGE, values, download=True)] == [
        "stable_diffusion"
    ]
    assert asked == [("owner/name", "generator_checkpoint_path")]


def test_help_without_a_family_lists_common_keys_once_and_those_of_each(capsys):
    with pytest.raises(SystemExit):
        registry.load_task(TEXT_TO_IMAGE, ["--help"])
    said = capsys.readouterr().out
    common, cascade = said.split("KEYS OF STABLE CASCADE")
    cascade, diffusion = cascade.split("KEYS OF STABLE DIFFUSION")
    assert "KEYS OF EVERY FAMILY" in common
    assert [part.count("\nseeds (") for part in (common, cascade, diffusion)] == [1, 0, 0]
    assert [part.count("\nstage_b_steps (") for part in (common, cascade, diffusion)] == [0, 1, 0]
    assert [part.count("\nkarras (") for part in (common, cascade, diffusion)] == [0, 0, 1]


def test_every_family_says_what_it_can():
    for family in registry.families():
        assert family.title
        for task in (TEXT_TO_IMAGE, RECONSTRUCTION):
            kind = family.task(task)
            assert kind is None or kind.Config is family.config_of(task)
        assert len({form.name for form in family.formats}) == len(family.formats)


@pytest.mark.integration
def test_listing_families_and_their_formats_imports_no_library_of_networks():
    code = (
        "import sys; from families import registry; registry.export_formats(); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
