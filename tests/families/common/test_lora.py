"""LoRA on networks of diffusers and transformers: files that both load, names of kohya, several at once."""

import re
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from families.common.lora import LoraError, adapters_of, add_adapters, merge_loras
from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats import Lora, LoraFileError
from modules.lora import LoraSettings
from tests.families.common.tiny_clip import write_two_encoders
from tests.families.common.tiny_unets import SD15, SDXL, inputs, library_call, unet
from tests.modules.test_lora import randomised

KINDS = {
    "attention": (["to_q", "to_v", "to_out"], {}),
    "convolutions": ([r"conv\d?$", "conv_shortcut", "proj_in", "time_emb_proj"], {}),
    "DoRA": (["to_k", "ff.net", "conv1"], {"dora": True}),
    "rank-stabilised": (["attn2"], {"rank_stabilised": True}),
}
TEXT = ["q_proj", "out_proj", "fc1"]


def lora_on(network: torch.nn.Module, filters, seed: int = 3, **settings) -> Lora:
    """A random LoRA with adapters where filters find layers; the network has them now."""
    add_adapters(network, filters, LoraSettings(**{"rank": 3, "alpha": 2} | settings))
    return Lora(adapters_of(randomised(network, seed)))


def text_encoders(folder: Path) -> dict[str, torch.nn.Module]:
    return {
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    }


def sdxl_pipeline(folder: Path) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=None, unet=unet(SDXL), scheduler=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
        **text_encoders(folder),
    )  # fmt: skip


def same(one: dict[str, Lora], other: dict[str, Lora]) -> None:
    assert one.keys() == other.keys()
    for network, lora in one.items():
        found = other[network].adapters
        assert found.keys() == lora.adapters.keys()
        for place, adapter in lora.adapters.items():
            assert torch.equal(found[place].down, adapter.down)
            assert torch.equal(found[place].up, adapter.up)
            assert found[place].scale == pytest.approx(adapter.scale)
            assert (adapter.magnitude is None) == (found[place].magnitude is None)
            if adapter.magnitude is not None:
                assert torch.equal(found[place].magnitude.flatten(), adapter.magnitude)


@pytest.mark.parametrize("form", ["warpcore", "diffusers", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back_to_the_bit_and_merge_to_what_was_trained(kind, form, tmp_path):
    trained, plain, given = unet(SDXL), unet(SDXL), inputs(SDXL)
    filters, settings = KINDS[kind]
    lora = lora_on(trained, filters, **settings)
    write_loras({"unet": lora}, tmp_path / "x.safetensors", form, {"unet": trained})
    back = read_loras(tmp_path / "x.safetensors", {"unet": plain})
    same({"unet": lora}, back)
    with torch.no_grad():
        untouched = library_call(plain, given)
        merge_loras(plain, [(back["unet"], 1.0)])
        output = library_call(plain, given)
        torch.testing.assert_close(output, library_call(trained, given), rtol=1e-4, atol=1e-4)
    assert (output - untouched).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_our_file_through_peft_with_the_same_output(kind, tmp_path):
    trained, theirs, given = unet(SDXL), unet(SDXL), inputs(SDXL)
    filters, settings = KINDS[kind]
    write_loras({"unet": lora_on(trained, filters, **settings)}, tmp_path / "x.safetensors", "diffusers",
                {"unet": trained})  # fmt: skip
    state, metadata = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, weight_name="x.safetensors", return_lora_metadata=True
    )[::2]
    theirs.load_lora_adapter(state, prefix="unet", metadata=metadata)
    assert any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in theirs.modules())
    with torch.no_grad():
        torch.testing.assert_close(library_call(theirs, given), library_call(trained, given), rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_pipeline_of_diffusers_loads_a_lora_of_all_its_networks(form, tmp_path):
    write_two_encoders(tmp_path)
    networks = {"unet": unet(SDXL)} | text_encoders(tmp_path)
    filters = {"unet": ["attn", "ff.net"], "text_encoder": TEXT, "text_encoder_2": TEXT}
    loras = {name: lora_on(network, filters[name]) for name, network in networks.items()}
    write_loras(loras, tmp_path / "x.safetensors", form, networks)
    pipeline, given, ids = sdxl_pipeline(tmp_path), inputs(SDXL), torch.arange(20).view(2, 10)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    with torch.no_grad():
        expected, output = library_call(networks["unet"], given), library_call(pipeline.unet, given)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        for name in ("text_encoder", "text_encoder_2"):
            plain = text_encoders(tmp_path)[name](ids).last_hidden_state
            expected = networks[name](ids).last_hidden_state
            torch.testing.assert_close(getattr(pipeline, name)(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
            assert (expected - plain).abs().max() > 0.01
    plain = {"unet": unet(SDXL)} | text_encoders(tmp_path)
    same(loras, read_loras(tmp_path / "x.safetensors", plain))


def test_kohyas_names_and_shapes_follow_the_rules_of_its_scripts(tmp_path):
    """SD 1.x: names of diffusers, flat, `lora_te_`. SDXL: the U-Net's original names, `lora_te1_` and `lora_te2_`."""
    write_two_encoders(tmp_path)
    encoders = text_encoders(tmp_path)
    small = {"unet": unet(SD15), "text_encoder": encoders["text_encoder"]}
    loras = {
        "unet": lora_on(small["unet"], ["to_out", "conv1"]),
        "text_encoder": lora_on(encoders["text_encoder"], TEXT),
    }
    write_loras(loras, tmp_path / "sd.safetensors", "kohya", small)
    file = load_file(tmp_path / "sd.safetensors")
    layers = {name.partition(".")[0] for name in file}
    modules = {f"lora_unet_{name.replace('.', '_')}": module for name, module in unet(SD15).named_modules()}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in layers
    assert "lora_te_text_model_encoder_layers_2_self_attn_q_proj" in layers
    assert all(layer in modules or layer.startswith("lora_te_text_model_encoder_layers_") for layer in layers)
    for layer in layers & modules.keys():
        weight, down = modules[layer].weight, file[f"{layer}.lora_down.weight"]
        assert down.shape == (3, *weight.shape[1:])
        assert file[f"{layer}.lora_up.weight"].shape == (weight.shape[0], 3, *[1] * (weight.dim() - 2))
        assert file[f"{layer}.alpha"].item() == 2

    large = {"unet": unet(SDXL)} | text_encoders(tmp_path)
    loras = {name: lora_on(network, ["to_q"] if name == "unet" else ["fc2"]) for name, network in large.items()}
    write_loras(loras, tmp_path / "xl.safetensors", "kohya", large)
    layers = {name.partition(".")[0] for name in load_file(tmp_path / "xl.safetensors")}
    assert {layer for layer in layers if "unet" in layer} == {
        f"lora_unet_{block}_1_transformer_blocks_{depth}_attn{attention}_to_q"
        for block in ("input_blocks_3", "middle_block", "output_blocks_0", "output_blocks_1")
        for depth in (0, 1) for attention in (1, 2)
    }  # fmt: skip
    assert {re.sub(r"\d+_mlp_fc2", "N", layer) for layer in layers if "unet" not in layer} == {
        "lora_te1_text_model_encoder_layers_N", "lora_te2_text_model_encoder_layers_N"
    }  # fmt: skip


def test_names_of_other_programs_are_read(tmp_path):
    trained = unet(SDXL)
    lora = lora_on(trained, ["to_q", "to_out"])
    write_loras({"unet": lora}, tmp_path / "d.safetensors", "diffusers", {"unet": trained})
    write_loras({"unet": lora}, tmp_path / "k.safetensors", "kohya", {"unet": trained})
    theirs, kohya = load_file(tmp_path / "d.safetensors"), load_file(tmp_path / "k.safetensors")
    flat = {place: place.replace(".", "_") for place in lora.adapters}
    spellings = {
        "diffusers before peft": {
            re.sub(r"\.(to_q|to_out)(\.0)?\.lora_([AB])\.weight", lambda m: (
                f".processor.{m[1]}_lora.{'down' if m[3] == 'A' else 'up'}.weight"), name): tensor
            for name, tensor in theirs.items()
        },
        "without a network's name": {name.removeprefix("unet."): tensor for name, tensor in theirs.items()},
        "kohya, in diffusers' names": {
            f"lora_unet_{flat[place]}.{part}": tensor
            for place, adapter in lora.adapters.items()
            for part, tensor in (("lora_down.weight", adapter.down), ("lora_up.weight", adapter.up),
                                 ("alpha", torch.tensor(2.0)))
        },
        "kohya, in original names": kohya,
    }  # fmt: skip
    for spelling, tensors in spellings.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        back = read_loras(tmp_path / "x.safetensors", {"unet": unet(SDXL)})["unet"].adapters
        assert back.keys() == lora.adapters.keys(), spelling
        assert all(torch.equal(back[place].up, adapter.up) for place, adapter in lora.adapters.items())
        assert {adapter.alpha for adapter in back.values()} == {2.0 if "kohya" in spelling else 3}


def other_shape(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix as a 1 x 1 convolution, and the other way round; other kernels stay."""
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    return tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor


@pytest.mark.parametrize("form", ["warpcore", "diffusers", "kohya"])
def test_a_layer_may_be_a_matrix_in_the_file_and_a_convolution_here(form, tmp_path):
    """Programs build projections of SD's transformers as linear layers or as 1 x 1 convolutions."""
    path, network = tmp_path / "x.safetensors", unet(SD15)
    lora = lora_on(network, ["proj_in", "to_q", "conv_shortcut", "conv1"])
    write_loras({"unet": lora}, path, form, {"unet": network})
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kept = {name for name, t in tensors.items() if t.dim() < 2 or (form == "warpcore" and name.endswith("up"))}
    flipped = {name: t if name in kept else other_shape(t) for name, t in tensors.items()}
    assert any(flipped[name].shape != tensor.shape for name, tensor in tensors.items())
    save_file(flipped, path, about)
    same({"unet": lora}, read_loras(path, {"unet": unet(SD15)}))
    name = next(name for name, t in tensors.items() if t.dim() == 4 and t.shape[2:] == (3, 3))
    save_file(tensors | {name: tensors[name][..., :1, :1].contiguous()}, path, about)
    with pytest.raises(LoraFileError, match="made for another network"):
        read_loras(path, {"unet": unet(SD15)})
    save_file(tensors | {name: tensors[name].flatten()}, path, about)
    with pytest.raises(LoraFileError, match=r"which is no matrix|has rank 432"):
        read_loras(path, {"unet": unet(SD15)})


def test_a_folder_of_pefts_is_read(tmp_path):
    theirs, plain, given = unet(SD15), unet(SD15), inputs(SD15)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 1})
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        merge_loras(plain, [(read_loras(tmp_path, {"unet": plain})["unet"], 1.0)])
        torch.testing.assert_close(library_call(plain, given), library_call(theirs, given), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_loras_at_once_are_the_merged_sum_and_what_peft_computes(tmp_path):
    strengths, given = {"one": 0.7, "two": -0.4}, inputs(SD15)
    loras = {
        "one": lora_on(unet(SD15), ["to_q", "conv1"]),
        "two": lora_on(unet(SD15), ["to_q", "ff.net"], seed=4, rank=2, rank_stabilised=True),
    }
    theirs, together, apart = unet(SD15), unet(SD15), unet(SD15)
    for name, lora in loras.items():
        write_loras({"unet": lora}, tmp_path / f"{name}.safetensors", "diffusers", {"unet": theirs})
        state, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
            tmp_path, weight_name=f"{name}.safetensors", return_lora_metadata=True
        )[::2]
        theirs.load_lora_adapter(state, prefix="unet", metadata=metadata, adapter_name=name)
    theirs.set_adapters(list(strengths), list(strengths.values()))
    before = {name: weight.clone() for name, weight in together.state_dict().items()}
    merge_loras(together, [(loras[name], strength) for name, strength in strengths.items()])
    changes = dict.fromkeys(before, 0.0)
    for name, strength in strengths.items():
        alone = unet(SD15)
        merge_loras(alone, [(loras[name], 1.0)])
        changes = {key: changes[key] + strength * (w - before[key]) for key, w in alone.state_dict().items()}
    apart.load_state_dict({name: before[name] + changes[name] for name in before})
    with torch.no_grad():
        output = library_call(together, given)
        torch.testing.assert_close(output, library_call(apart, given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output, library_call(theirs, given), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_one_clear_error(tmp_path):
    path, trained, plain = tmp_path / "x.safetensors", unet(SDXL), {"unet": unet(SDXL)}
    write_two_encoders(tmp_path)
    networks = {"unet": trained} | text_encoders(tmp_path)
    loras = {"unet": lora_on(trained, ["to_q"]), "text_encoder": lora_on(networks["text_encoder"], TEXT)}

    def refusal(networks) -> str:
        with pytest.raises(LoraFileError) as error:
            read_loras(path, networks)
        return str(error.value)

    for form in ("warpcore", "diffusers", "kohya"):
        write_loras(loras, path, form, networks)
        assert "here it is read for unet alone" in refusal(plain)
    write_loras({"unet": loras["unet"]}, path, "diffusers", networks)
    assert "of a layer that this network does not have" in refusal({"unet": unet(SD15)})
    wider = {"unet": unet(SDXL | {"cross_attention_dim": 20, "block_out_channels": (16, 48)})}
    assert "(32, 32) in the file (rank 3) and (48, 48) here. Check the file" in refusal(wider)
    save_file(unet(SDXL).state_dict(), path)
    assert "it is no LoRA" in refusal(plain)
    assert "it is no LoRA: it holds " in refusal(plain | text_encoders(tmp_path))
    save_file({"lora_unet_input_blocks_3_1_proj_in.hada_w1_a": torch.zeros(1)}, path)
    assert "has the shape (1,), which is no matrix" in refusal(plain)
    path.write_bytes(b"no")
    assert "cannot be read" in refusal(plain)
    with pytest.raises(LoraFileError, match="no LoRA format 'onnx'"):
        write_loras(loras, path, "onnx", networks)
    with pytest.raises(LoraError, match="'to_queries' finds no layer"):
        add_adapters(unet(SD15), ["to_queries"], LoraSettings(rank=2, alpha=2))
