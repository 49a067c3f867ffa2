"""Exported files through other programs' own code, and what these write through ours: outputs, not only names.

docs/files.md says which program reads which format, and which test holds it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from families.cascade.lora_files import write_lora
from families.common.autoencoders import Autoencoder
from families.common.lora import adapters_of, add_adapters, merge_loras
from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats import Lora
from families.cosmos.exports import to_published
from families.cosmos.original_names import published_tensors
from families.cosmos.transformer import CosmosTransformer3DModel
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.stable_diffusion.exports import export_lora, to_single_file
from modules.lora import LoraSettings
from tests.docs.pages import ROOT, blocks
from tests.families.common.test_lycoris_files import by_comfyui
from tests.families.common.tiny_clip import write_encoder, write_tokenizer
from tests.families.common.tiny_unets import SD15, inputs, library_call, unet
from tests.families.cosmos.tiny_pipeline import TRANSFORMER, transformer
from tests.families.dit.pixart import SMALL
from tests.families.stable_diffusion.tiny_pipeline import write_sd15
from tests.families.stable_diffusion.tiny_t5_pipeline import write_t5_pipeline
from tests.modules.test_dit import golden_network as golden_dit
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model, small_inputs
from tests.tiers import represented_by
from warpcore.weights import write_weights

ATTENTION = ("to_q", "to_v", "to_out")


def lora_on(network: nn.Module, *filters: str, **settings) -> Lora:
    """A random LoRA, whose alpha is not its rank; the network has it now."""
    add_adapters(network, filters or ATTENTION, LoraSettings(**{"rank": 3, "alpha": 2} | settings))
    return Lora(adapters_of(randomised(network, 3)))


def same_and_not(found: Tensor, expected: Tensor, untouched: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - untouched).abs().max() > 1e-3


# ---------------------------------------------------------------- LyCORIS


@pytest.fixture
def lycoris():
    return pytest.importorskip("lycoris", reason="LyCORIS is not installed: pip install lycoris-lora")


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_lycoris_merges_a_lora_of_a_u_net_in_kohyas_names(lycoris, settings, tmp_path):
    trained, theirs, given = unet(SD15), unet(SD15), inputs(SD15)
    lora = lora_on(trained, *ATTENTION, "conv1", "proj_in", **settings)
    write_loras({"unet": lora}, tmp_path / "x.safetensors", "kohya", {"unet": trained})
    untouched = library_call(theirs, given)
    merge_by_lycoris(lycoris, tmp_path / "x.safetensors", theirs, len(lora.adapters))
    same_and_not(library_call(theirs, given), library_call(trained, given), untouched)


@torch.no_grad()
def test_lycoris_merges_a_lora_of_a_text_encoder_in_kohyas_names(lycoris, tmp_path):
    write_encoder(tmp_path, write_tokenizer(tmp_path), seed=1)
    trained, theirs = (CLIPTextModel.from_pretrained(tmp_path).eval() for _ in range(2))
    ids = torch.arange(20).view(2, 10)
    lora, untouched = lora_on(trained, "q_proj", "fc1"), theirs(ids).last_hidden_state
    write_loras({"text_encoder": lora}, tmp_path / "x.safetensors", "kohya", {"text_encoder": trained})
    named = nn.Module()  # as the network that kohya's scripts have, whose layers are in `text_model`
    named.text_model = getattr(theirs, "text_model", theirs)
    merge_by_lycoris(lycoris, tmp_path / "x.safetensors", named, len(lora.adapters), "lora_te")
    same_and_not(theirs(ids).last_hidden_state, trained(ids).last_hidden_state, untouched)


@torch.no_grad()
def test_lycoris_merges_a_lora_of_stage_c_in_kohyas_names(lycoris, tmp_path):
    trained, theirs, given = *(golden_model("stage_c_small")[0].eval() for _ in range(2)), small_inputs()
    lora, untouched = lora_on(trained, "channelwise", "mapper"), theirs(**given)
    write_lora(lora, tmp_path / "x.safetensors", "kohya")
    merge_by_lycoris(lycoris, tmp_path / "x.safetensors", theirs, len(lora.adapters))
    same_and_not(theirs(**given), trained(**given), untouched)


def merge_by_lycoris(lycoris, file: Path, network: nn.Module, layers: int, prefix: str = "lora_unet") -> None:
    read_by_lycoris(lycoris, file, network, layers, prefix).merge_to()


def read_by_lycoris(lycoris, file: Path, network: nn.Module, layers: int, prefix: str = "lora_unet") -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", prefix)  # as its own file for kohya's scripts has it
        found, _ = lycoris.create_lycoris_from_weights(1.0, str(file), network)
    assert len(found.loras) == layers
    return found


@pytest.mark.parametrize("settings", [{}, {"dora_wd": True}], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_what_lycoris_trained_is_read(lycoris, settings, tmp_path):
    theirs, ours, given = unet(SD15), unet(SD15), inputs(SD15)
    untouched = library_call(ours, given)
    keys = {"linear_dim": 3, "linear_alpha": 2, "preset": "attn-only"} | settings
    made = lycoris.create_lycoris(theirs, 1.0, **keys)
    made.apply_to()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, tmp_path / "x.safetensors")
    lora = read_loras(tmp_path / "x.safetensors", {"unet": ours})["unet"]
    assert len(lora.adapters) == len(made.loras)
    merge_loras(ours, [(lora, 1.0)])
    same_and_not(library_call(ours, given), library_call(theirs, given), untouched)


LYCORIS_KINDS = {
    "LoKr": ({"kind": "lokr", "factor": 4}, {"algo": "lokr", "factor": 4}),
    "LoKr both": ({"kind": "lokr", "rank": 1, "decompose_both": True}, {"algo": "lokr", "decompose_both": True}),
    "LoKr whole": ({"kind": "lokr", "full_matrix": True}, {"algo": "lokr", "full_matrix": True}),
    "LoHa": ({"kind": "loha"}, {"algo": "loha"}),
}
"""Settings of a kind of adapter here, and LyCORIS's own."""


def settings_of(kind: str) -> dict[str, object]:
    return {} if kind == "LoRA" else LYCORIS_KINDS[kind][0]


@pytest.mark.parametrize("kind", LYCORIS_KINDS)
@torch.no_grad()
def test_lycoris_computes_with_a_lokr_and_a_loha_in_kohyas_names(kind, lycoris, tmp_path):
    """By its layers: what it merges counts alpha / rank twice, which is right where alpha is the rank."""
    trained, theirs, given = unet(SD15), unet(SD15), inputs(SD15)
    settings = {"alpha": 0.5} | LYCORIS_KINDS[kind][0]
    lora = lora_on(trained, *ATTENTION, "proj_in", "conv1", **settings)
    write_loras({"unet": lora}, tmp_path / "x.safetensors", "kohya", {"unet": trained})
    untouched = library_call(theirs, given)
    read_by_lycoris(lycoris, tmp_path / "x.safetensors", theirs, len(lora.adapters)).apply_to()
    same_and_not(library_call(theirs, given), library_call(trained, given), untouched)


@pytest.mark.parametrize("kind", ["LoRA", *LYCORIS_KINDS])
@torch.no_grad()
def test_lycoris_computes_with_adapters_of_pixart_in_kohyas_names(kind, lycoris, tmp_path):
    trained, theirs = pixart(PixArtTransformer2DModel), pixart(diffusers.PixArtTransformer2DModel)
    lora = lora_on(trained, *ATTENTION, "ff.net", **settings_of(kind))
    write_loras({"transformer": lora}, tmp_path / "x.safetensors", "kohya", {"transformer": trained})
    untouched = of_pixart(theirs)
    read_by_lycoris(lycoris, tmp_path / "x.safetensors", theirs, len(lora.adapters)).apply_to()
    same_and_not(of_pixart(theirs), of_pixart(trained), untouched)


@pytest.mark.parametrize("tucker", [False, True], ids=["", "Tucker"])
@pytest.mark.parametrize("kind", LYCORIS_KINDS)
@torch.no_grad()
def test_a_lokr_and_a_loha_that_lycoris_trained_are_read(kind, tucker, lycoris, tmp_path):
    theirs, ours, given = unet(SD15), unet(SD15), inputs(SD15)
    untouched = library_call(ours, given)
    keys = {"linear_dim": 2, "linear_alpha": 0.5, "preset": "full", "use_tucker": tucker} | LYCORIS_KINDS[kind][1]
    made = lycoris.create_lycoris(theirs, 1.0, **keys)
    made.apply_to()
    for name, parameter in made.named_parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, tmp_path / "x.safetensors")
    lora = read_loras(tmp_path / "x.safetensors", {"unet": ours})["unet"]
    assert len(lora.adapters) == len(made.loras)
    merge_loras(ours, [(lora, 1.0)])
    same_and_not(library_call(ours, given), library_call(theirs, given), untouched)


# ---------------------------------------------------------------- Stable Diffusion by diffusers


@torch.no_grad()
def test_diffusers_opens_the_trained_autoencoder_in_a_single_file(tmp_path):
    """Where A1111 and ComfyUI read it, too; by itself a run's file has diffusers' names."""
    folder = write_sd15(tmp_path / "pipeline")
    trained = Autoencoder.load(folder)
    for parameter in trained.parameters():
        parameter += 0.05
    latents, file = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), tmp_path / "whole.safetensors"
    write_weights(tmp_path / "autoencoder.safetensors", trained.weights_to_save(), trained.metadata_to_save())
    to_single_file(folder, file, [f"autoencoder_checkpoint_path={tmp_path / 'autoencoder.safetensors'}"])
    kind, untouched = diffusers.AutoencoderKL, Autoencoder.load(folder).model
    theirs = kind.from_single_file(str(file), config=str(folder), subfolder="vae", local_files_only=True)
    found, expected, before = (network.decode(latents).sample for network in (theirs, trained.model, untouched))
    same_and_not(found, expected, before)


@pytest.mark.parametrize("kind", represented_by("kohya", of=["kohya", "diffusers"]))
@torch.no_grad()
def test_diffusers_loads_a_lora_on_a_u_net_that_reads_with_t5(kind, tmp_path):
    folder = write_t5_pipeline(tmp_path / "pipeline", "sd15")
    trained, theirs = (diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval() for _ in range(2))
    lora, ours, file = lora_on(trained), tmp_path / "ours.safetensors", tmp_path / "x.safetensors"
    write_loras({"unet": lora}, ours, "warpcore", {"unet": trained},
                {"family": "stable_diffusion", "model_version": "sd15"})  # fmt: skip
    export_lora(kind, ours, file, [f"generator_checkpoint_path={folder}"])
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 12, 16, generator=random)
    untouched = theirs(x, 7, text).sample
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
        tmp_path, weight_name=file.name, unet_config=theirs.config, return_lora_metadata=True
    )
    theirs.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    same_and_not(theirs(x, 7, text).sample, trained(x, 7, text).sample, untouched)


# ---------------------------------------------------------------- PixArt-alpha by peft, Cosmos and DiT by diffusers


def pixart(kind: type) -> nn.Module:
    torch.manual_seed(0)
    with_texts = (8,) if kind is PixArtTransformer2DModel else ()
    network = kind(*with_texts, **SMALL).eval()
    random = torch.Generator().manual_seed(4)
    for name, parameter in sorted(network.named_parameters()):
        if name != "y_embedding":
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return network


@torch.no_grad()
def of_pixart(network: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 4, 4, generator=random), torch.randn(2, 8, SMALL["caption_channels"], generator=random)
    return network(x, encoder_hidden_states=text, timestep=torch.tensor([9, 700]),
                   added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample  # fmt: skip


@torch.no_grad()
def test_peft_loads_a_lora_of_pixart_into_the_network_of_diffusers(tmp_path, monkeypatch):
    """By the lines of docs/pixart.md: diffusers has no loader of its own."""
    assert not hasattr(diffusers.PixArtTransformer2DModel, "load_lora_adapter")
    trained, theirs = pixart(PixArtTransformer2DModel), pixart(diffusers.PixArtTransformer2DModel)
    untouched, lora = of_pixart(theirs), lora_on(trained, *ATTENTION, "ff.net")
    write_loras({"transformer": lora}, tmp_path / "my_lora.safetensors", "diffusers", {"transformer": trained})
    (block,) = blocks("python", pages=[ROOT / "docs" / "pixart.md"])
    monkeypatch.chdir(tmp_path)
    exec(block.text, {"pipe": SimpleNamespace(transformer=theirs)})
    layers = [layer for layer in theirs.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(lora.adapters)
    same_and_not(of_pixart(theirs), of_pixart(trained), untouched)


def library_cosmos(of: nn.Module) -> diffusers.CosmosTransformer3DModel:
    """diffusers' own class with the weights of a network."""
    network = diffusers.CosmosTransformer3DModel(**TRANSFORMER).eval()
    network.load_state_dict(of.state_dict())
    return network


def our_cosmos() -> CosmosTransformer3DModel:
    network = CosmosTransformer3DModel(**TRANSFORMER).eval()
    network.load_state_dict(transformer().state_dict())
    return network


@torch.no_grad()
def of_cosmos(network: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 1, 4, 6, generator=random), torch.randn(2, 5, 16, generator=random)
    return network(x, torch.tensor([0.2, 0.9]), text, padding_mask=torch.zeros(1, 1, 32, 48)).sample


def from_published(file: Path, folder: Path) -> diffusers.CosmosTransformer3DModel:
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "CosmosTransformer3DModel"} | TRANSFORMER
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kind = diffusers.CosmosTransformer3DModel
    return kind.from_single_file(str(file), config=str(folder), subfolder="transformer", local_files_only=True).eval()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_diffusers_opens_a_published_file_of_cosmos(name, tmp_path):
    network = transformer().eval()
    network.save_pretrained(tmp_path / "folder" / "transformer")
    to_published(tmp_path / "folder" / "transformer", tmp_path / name, ["export_dtype=float32", "model_version=mini"])
    found = of_cosmos(from_published(tmp_path / name, tmp_path / "theirs"))
    torch.testing.assert_close(found, of_cosmos(network), rtol=0, atol=1e-5)


def test_comfyui_takes_a_published_file_of_cosmos_for_what_it_is(tmp_path):
    """Its rules: `net.` before all names, a layer that tells the architecture, and shapes that tell the numbers."""
    transformer().save_pretrained(tmp_path / "transformer")
    keys = ["export_dtype=float32", "model_version=mini"]
    to_published(tmp_path / "transformer", tmp_path / "model.safetensors", keys)
    file = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("net.") for name in file)
    assert "net.blocks.0.mlp.layer1.weight" in file
    width, patch = file["net.x_embedder.proj.1.weight"].shape
    assert (width, patch // 4 - 1) == (24, TRANSFORMER["in_channels"])  # of a patch of 2 x 2, with a mask
    assert len({name.split(".")[2] for name in file if name.startswith("net.blocks.")}) == TRANSFORMER["num_layers"]


def test_diffusers_network_of_cosmos_loads_a_lora_from_its_file(tmp_path):
    """Its pipeline has no `load_lora_weights`; the network has a loader, which reads alpha in the metadata."""
    assert not hasattr(diffusers.Cosmos2TextToImagePipeline, "load_lora_weights")
    trained = our_cosmos()
    theirs, untouched = library_cosmos(trained), of_cosmos(trained)
    lora = lora_on(trained, *ATTENTION, "ff.net")
    write_loras({"transformer": lora}, tmp_path / "x.safetensors", "diffusers", {"transformer": trained})
    theirs.load_lora_adapter(str(tmp_path), weight_name="x.safetensors", prefix="transformer")
    same_and_not(of_cosmos(theirs), of_cosmos(trained), untouched)


@pytest.mark.parametrize(
    ("program", "kind"), [("published", "LoRA"), *(("comfyui", kind) for kind in ("LoRA", *LYCORIS_KINDS))]
)
@torch.no_grad()
def test_published_weights_with_adapters_of_cosmos_added_compute_the_same(program, kind, tmp_path):
    """The rules of ComfyUI and of the published program, on a published file that diffusers opens."""
    trained = our_cosmos()
    untouched, published = of_cosmos(trained), published_tensors(trained.state_dict(), 12)
    lora = lora_on(trained, *ATTENTION, "ff.net", **settings_of(kind))
    write_loras({"transformer": lora}, tmp_path / "x.safetensors", program, {"transformer": trained})
    file, layers = load_file(tmp_path / "x.safetensors"), 0
    prefix, end = {"comfyui": ("diffusion_model.", "weight"), "published": ("net.", "default.weight")}[program]
    for name in [name for name in published if name.endswith(".weight")]:
        layer = prefix + name.removesuffix(".weight")
        if kind != "LoRA":
            change = by_comfyui(file, layer, published[name])
        elif (change := file.pop(f"{layer}.lora_A.{end}", None)) is not None:
            alpha = file.pop(f"{layer}.alpha") if program == "comfyui" else len(change)
            change = file.pop(f"{layer}.lora_B.{end}") @ change * (alpha / len(change))
        if change is not None:
            published[name] = published[name] + change
            layers += 1
    assert (layers, file) == (len(lora.adapters), {})
    whole = tmp_path / "whole.safetensors"
    save_file({f"net.{name}": tensor.contiguous() for name, tensor in published.items()}, whole)
    same_and_not(of_cosmos(from_published(whole, tmp_path)), of_cosmos(trained), untouched)


BLOCK_OF_DIT = {
    "adaLN_modulation.1": ["norm1.linear"], "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"], "mlp.fc1": ["ff.net.0.proj"], "mlp.fc2": ["ff.net.2"],
}  # fmt: skip
"""Layers of a published block -> those of diffusers that its rows become, in their order."""
WHOLE_DIT = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}  # fmt: skip


@torch.no_grad()
def test_diffusers_network_computes_with_the_published_tensors_of_dit():
    """A published file has the state of our network: see tests/families/dit/test_drawing.py.

    The library divides the exponents of the frequencies of time by 127, the published network by 128.
    """
    ours, spec, _ = golden_dit("dit_class_small")
    numbers, state = spec["constructor"], ours.eval().state_dict()
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=numbers["num_heads"], attention_head_dim=numbers["hidden_size"] // numbers["num_heads"],
        in_channels=4, out_channels=8, num_layers=numbers["depth"], sample_size=numbers["input_size"][1],
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    tensors = {}
    for end in ("weight", "bias"):
        tensors |= {f"{there}.{end}": state[f"{name}.{end}"] for name, there in WHOLE_DIT.items()}
        for block in range(numbers["depth"]):
            for name, parts in BLOCK_OF_DIT.items():
                for part, rows in zip(parts, state[f"blocks.{block}.{name}.{end}"].chunk(len(parts)), strict=True):
                    tensors[f"transformer_blocks.{block}.{part}.{end}"] = rows
            emb = f"transformer_blocks.{block}.norm1.emb"
            for number, name in ((1, "0"), (2, "2")):
                tensors[f"{emb}.timestep_embedder.linear_{number}.{end}"] = state[f"t_embedder.mlp.{name}.{end}"]
            tensors[f"{emb}.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    for module in theirs.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = 0
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times, classes = torch.tensor([5, 900]), torch.tensor([1, 7])
    found = theirs(x, times, classes).sample
    torch.testing.assert_close(found, ours(x, times, classes), rtol=1e-4, atol=1e-4)
