"""LoRAs and trained tokens of Stable Diffusion in the files of diffusers, kohya's scripts and A1111, both ways."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common import weight_source
from families.common.lora import add_adapters, merge_loras
from families.common.lora_files import write_loras
from families.common.lora_formats import LoraFileError
from families.common.lora_training import add_tokens, lora_of, train_tokens
from families.common.weight_source import DONE
from families.stable_diffusion import build
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.lora import encoders_by_name, networks_by_name, open_loras, read_lora
from modules.lora import LoraSettings, adapters
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from warpcore.config import make_config

PIPELINES = {
    "sd15": (write_sd15, diffusers.StableDiffusionPipeline), "sdxl": (write_sdxl, diffusers.StableDiffusionXLPipeline)
}  # fmt: skip
PROMPTS = ["a [fernando] p", "a cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {version: write(folder / version) for version, (write, _) in PIPELINES.items()}


class Trained:
    """Networks of a tiny pipeline with adapters and a token that are not zero, and without them."""

    def __init__(self, folder, version: str, tokens: bool = True, dora: bool = False):
        self.folder, self.version = folder, version
        self.settings = make_config(
            SdSettings, {"model_version": version, "generator_checkpoint_path": str(folder)}
        )  # fmt: skip
        self.unet, self.text = self.fresh()
        self.networks, self.rows = networks_by_name(self.unet, self.text), {}
        torch.manual_seed(1)
        for name, network in self.networks.items():
            network.requires_grad_(False)
            filters = ["to_q", "to_out", "conv1", "ff.net"] if name == "unet" else ["self_attn", "mlp"]
            add_adapters(network, filters, LoraSettings(rank=2, alpha=3, dora=dora))
            for _, _, adapter in adapters(network):
                adapter.up.data = 0.2 * torch.randn_like(adapter.up)
        for name, encoder in encoders_by_name(self.text).items() if tokens else ():
            self.rows[name] = train_tokens(encoder, [("[fernando]", "^p")])
            self.rows[name].delta.data += torch.randn_like(self.rows[name].delta)
        self.loras = {name: lora_of(network, self.rows.get(name)) for name, network in self.networks.items()}

    def fresh(self):
        return build.unet(self.settings), build.text_encoders(self.settings)

    def write(self, path, form):
        write_loras(self.loras, path, form, self.networks)
        return path

    def texts(self, text=None):
        made = (text or self.text)(PROMPTS)
        return made.hidden.float(), made.pooled

    def draw(self, unet=None):
        torch.manual_seed(4)
        hidden, pooled = self.texts()
        further = {} if pooled is None else {"text_embeds": pooled, "time_ids": torch.ones(2, 6) * 64}
        latents, times = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
        if unet is None:
            return self.unet(latents, times, encoder_hidden_states=hidden, **further)
        return unet(latents, times, hidden, added_cond_kwargs=further or None, return_dict=False)[0]


def pipeline_of(trained: Trained):
    return PIPELINES[trained.version][1].from_pretrained(trained.folder)


def their_texts(pipeline, prompts) -> tuple[torch.Tensor, torch.Tensor | None]:
    if hasattr(pipeline, "text_encoder_2"):
        return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[0::2]
    return pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0], None


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("version", PIPELINES)
@torch.no_grad()
def test_a_pipeline_of_diffusers_loads_our_lora_and_computes_the_same(folders, version, form, tmp_path):
    trained = Trained(folders[version], version, tokens=False)
    trained.write(tmp_path / "x.safetensors", form)
    pipeline = pipeline_of(trained)
    before = their_texts(pipeline, PROMPTS)[0]
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    hidden, pooled = their_texts(pipeline, PROMPTS)
    torch.testing.assert_close(hidden, trained.texts()[0], rtol=1e-5, atol=1e-5)
    if pooled is not None:
        torch.testing.assert_close(pooled, trained.texts()[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained.draw(pipeline.unet), trained.draw(), rtol=1e-5, atol=1e-5)
    assert (hidden - before).abs().max() > 0.01


@pytest.mark.parametrize("form", ["warpcore", "diffusers", "kohya"])
@pytest.mark.parametrize("version", PIPELINES)
@torch.no_grad()
def test_adapters_and_tokens_come_back_from_every_format(folders, version, form, tmp_path):
    trained = Trained(folders[version], version, dora=True)
    path = trained.write(tmp_path / "x.safetensors", form)
    unet, text = trained.fresh()
    networks = networks_by_name(unet, text)
    back = read_lora(path, networks, version)
    assert (tmp_path / "x_embeddings" / "fernando.safetensors").exists() == (form != "warpcore")
    for name, network in networks.items():
        assert back[name].tokens == trained.loras[name].tokens
        merge_loras(network, [(back[name], 1.0)])
    for name, encoder in encoders_by_name(text).items():
        add_tokens(encoder, [(back[name], 1.0)])
    torch.testing.assert_close(trained.texts(text)[0], trained.texts()[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained.draw(unet), trained.draw(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_diffusers_loads_the_embedding_of_stable_diffusion(folders, tmp_path):
    trained = Trained(folders["sd15"], "sd15")
    trained.write(tmp_path / "x.safetensors", "kohya")
    pipeline = pipeline_of(trained)
    pipeline.load_textual_inversion(tmp_path / "x_embeddings" / "fernando.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    torch.testing.assert_close(their_texts(pipeline, PROMPTS)[0], trained.texts()[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_diffusers_loads_the_embeddings_of_sdxl(folders, tmp_path):
    """By its documentation: `clip_l` for the first text encoder and `clip_g` for the second."""
    trained = Trained(folders["sdxl"], "sdxl")
    trained.write(tmp_path / "x.safetensors", "kohya")
    file = load_file(tmp_path / "x_embeddings" / "fernando.safetensors")
    assert {name: tensor.shape for name, tensor in file.items()} == {"clip_l": (1, 16), "clip_g": (1, 24)}
    pipeline = pipeline_of(trained)
    for tensor, end in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            file[tensor], token="[fernando]", text_encoder=getattr(pipeline, f"text_encoder{end}"),
            tokenizer=getattr(pipeline, f"tokenizer{end}"),
        )  # fmt: skip
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    torch.testing.assert_close(their_texts(pipeline, PROMPTS)[0], trained.texts()[0], rtol=1e-5, atol=1e-5)


def test_embeddings_of_other_programs_are_read(folders, tmp_path):
    one, two = (Trained(folders[version], version) for version in PIPELINES)
    row = torch.randn(1, 16)
    files = {"emb_params": {"emb_params": row}, "diffusers": {"<cat>": row}}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        found = read_lora(tmp_path / f"{name}.safetensors", one.networks, "sd15")
        assert found["text_encoder"].tokens == ["[emb_params]" if name == "emb_params" else "<cat>"]
        assert torch.equal(found["text_encoder"].token_initial, row)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 16)}, "name": "dog", "step": 3}
    torch.save(a1111, tmp_path / "a1111.pt")
    assert read_lora(tmp_path / "a1111.pt", one.networks, "sd15")["text_encoder"].tokens == ["[dog]", "[dog.2]"]
    with pytest.raises(LoraFileError, match="embedding of another model: clip_l is not in it"):
        read_lora(tmp_path / "diffusers.safetensors", two.networks, "sdxl")
    save_file({"clip_l": row, "clip_g": torch.randn(1, 24)}, tmp_path / "xl.safetensors")
    with pytest.raises(LoraFileError, match="an embedding for the two text encoders of SDXL"):
        read_lora(tmp_path / "xl.safetensors", one.networks, "sd15")
    path = two.write(tmp_path / "lora.safetensors", "kohya")
    bundled = load_file(path) | {f"bundle_emb.<cat>.{k}": t for k, t in load_file(tmp_path / "xl.safetensors").items()}
    save_file(bundled, tmp_path / "bundled.safetensors")
    found = read_lora(tmp_path / "bundled.safetensors", two.networks, "sdxl")
    assert found["text_encoder_2"].tokens == found["text_encoder"].tokens == ["<cat>"]
    assert found["unet"].adapters.keys() == two.loras["unet"].adapters.keys()


def test_a_folder_of_embeddings_is_an_entry_of_the_list(folders, tmp_path, caplog):
    trained = Trained(folders["sd15"], "sd15")
    lora, embeddings = trained.write(tmp_path / "x.safetensors", "kohya"), tmp_path / "x_embeddings"
    save_file({"<cat>": torch.randn(2, 16)}, embeddings / "cat.safetensors")
    (embeddings / "preview.png").touch()
    apart = lora.rename(tmp_path / "apart.safetensors")
    (found, strength), (tokens, _) = open_loras([f"{apart}:0.5", str(embeddings)], trained.settings)
    assert strength == 0.5
    assert not found["text_encoder"].tokens
    assert tokens["text_encoder"].tokens == ["<cat>", "<cat.2>", "[fernando]"]
    assert "Add the embeddings" not in caplog.text
    open_loras([str(apart)], trained.settings)
    assert "apart.safetensors: The LoRA was trained with the tokens [fernando], which are neither" in caplog.text
    shutil.copy(apart, embeddings)
    with pytest.raises(
        LoraFileError, match=r"apart\.safetensors is no embedding: name the file itself, or a folder of"
    ):
        open_loras([str(embeddings)], trained.settings)
    with pytest.raises(LoraFileError, match=r"pipelines.* holds no LoRA \(pytorch_lora_weights\.safetensors, or "):
        open_loras([str(folders["sd15"].parent)], trained.settings)


@pytest.mark.parametrize("form", ["warpcore", "diffusers", "kohya"])
def test_a_lora_of_the_other_version_is_one_error_that_names_both(folders, form, tmp_path):
    titles = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
    for version, other in (("sdxl", "sd15"), ("sd15", "sdxl")):
        trained, here = (Trained(folders[one], one, tokens=False) for one in (version, other))
        path = trained.write(tmp_path / f"{version}.safetensors", form)
        said = f"{path} is a LoRA of {titles[version]}, and the networks here are {titles[other]}"
        with pytest.raises(LoraFileError, match=said):
            read_lora(path, here.networks, other)


def test_a_lora_that_says_it_is_of_stable_diffusion_2_is_refused_by_name(folders, tmp_path):
    trained = Trained(folders["sd15"], "sd15", tokens=False)
    tensors = load_file(trained.write(tmp_path / "x.safetensors", "kohya"))
    save_file(tensors, tmp_path / "v2.safetensors", {"ss_base_model_version": "sd_v2_v"})
    with pytest.raises(LoraFileError, match=r"v2\.safetensors is a LoRA of Stable Diffusion 2\.x; supported are"):
        read_lora(tmp_path / "v2.safetensors", trained.networks, "sd15")


def test_tensors_that_are_not_known_are_named(folders, tmp_path):
    trained = Trained(folders["sd15"], "sd15", tokens=False)
    file = load_file(trained.write(tmp_path / "x.safetensors", "kohya"))
    save_file(file | {"lora_unet_down_blocks_9_proj.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(LoraFileError, match=r"down_blocks_9_proj.*a layer that this network does not have"):
        read_lora(tmp_path / "y.safetensors", trained.networks, "sd15")
    save_file(file | {"something.else": torch.zeros(1, 2)}, tmp_path / "z.safetensors")
    with pytest.raises(LoraFileError, match=r"it holds something.else"):
        read_lora(tmp_path / "z.safetensors", trained.networks, "sd15")


def test_a_lora_in_a_list_may_be_a_name_of_the_hub(folders, tmp_path, monkeypatch):
    trained = Trained(folders["sd15"], "sd15", tokens=False)
    file = trained.write(tmp_path / "owner" / "dogs" / "dogs.safetensors", "kohya")
    (file.parent / DONE).write_text(json.dumps({file.name: file.stat().st_size}))
    monkeypatch.setattr(weight_source, "MODELS", tmp_path)
    ((found, strength),) = open_loras(["owner/dogs:0.5"], trained.settings)
    assert strength == 0.5
    assert found["unet"].adapters.keys() == trained.loras["unet"].adapters.keys()
