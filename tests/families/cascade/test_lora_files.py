"""LoRA files of every format: bit-exact there and back, and what other programs make of them."""

import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from safetensors.torch import load_file, save_file

from families.cascade.config import ModelSettings
from families.cascade.lora import open_loras
from families.cascade.lora_files import read_lora, write_lora
from families.cascade.lora_formats import LoraFileError, metadata, to_reference, to_tensors
from families.cascade.versions import VERSIONS
from families.common.lora import merge_loras, parse_lora
from families.common.lora_training import add_tokens, lora_of, train_tokens
from modules.lora import LoraSettings, add_adapters, places, remove_adapters
from modules.stage_c import StageC
from modules.tokenizers import BytePairTokenizer
from modules.tokens import Token, TokenRows
from tests.golden import load_case, load_manifest, weights_of
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model, small_inputs
from tests.modules.test_tokens import word_tower
from tests.train.test_train_c import diffusers_network
from warpcore.errors import UserError

KINDS = {
    "attention": (["attn"], {}),
    "separate q, k, v": (["attn"], {"split_qkv": True}),
    "queries and values": ([r"attn\.(q|v)$"], {"split_qkv": True}),
    "DoRA": (["attn", "channelwise"], {"dora": True}),
    "convolutions": (["embedding.1", "clf.1", "depthwise"], {}),
    "rank-stabilised": (["mapper"], {"rank_stabilised": True}),
}
WHAT_FITS = {
    "warpcore": set(KINDS),
    "comfyui": set(KINDS),
    "peft": set(KINDS) - {"convolutions"},
    "reference": {"attention"},
}


def adapted(kind: str, rank: int = 3, alpha: float = 2, seed: int = 0) -> StageC:
    network, _, _ = golden_model("stage_c_small")
    torch.manual_seed(seed)
    filters, settings = KINDS[kind]
    add_adapters(network, filters, LoraSettings(rank=rank, alpha=alpha, **settings))
    return randomised(network, seed)


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.bits
@pytest.mark.parametrize(
    ("form", "kind"), [(form, kind) for form, kinds in WHAT_FITS.items() for kind in sorted(kinds)]
)
def test_every_format_gives_back_the_same_bits(form, kind, tmp_path):
    lora = lora_of(adapted(kind))
    plain, _, _ = golden_model("stage_c_small")
    path = tmp_path / ("folder" if form == "peft" else "lora.safetensors")
    write_lora(lora, path, form, plain)
    filters = [name for name in lora.adapters if name.rpartition(".")[2] not in "qkv"]
    back = read_lora(path, plain, filters=filters)
    assert_same(to_tensors(back), to_tensors(lora))
    for name, adapter in back.adapters.items():
        assert adapter.plain_alpha == pytest.approx(lora.adapters[name].plain_alpha, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_compute_what_the_adapters_do(kind):
    network, (plain, _, _) = adapted(kind), golden_model("stage_c_small")
    names = plain.state_dict().keys()
    merge_loras(plain, [(lora_of(network), 1.0)])
    assert plain.state_dict().keys() == names
    with torch.no_grad():
        torch.testing.assert_close(plain(**small_inputs()), network(**small_inputs()), rtol=1e-5, atol=1e-5)


def test_several_loras_add_up_each_by_its_strength():
    before = golden_model("stage_c_small")[0].state_dict()
    pieces = [("attention", 0.5), ("DoRA", -1.0), ("queries and values", 2.0)]
    merged = [golden_model("stage_c_small")[0] for _ in range(4)]
    loras = [(lora_of(adapted(kind, seed=i)), strength) for i, (kind, strength) in enumerate(pieces)]
    for network, chosen in zip(merged, [*([one] for one in loras), loras], strict=True):
        merge_loras(network, chosen)
    *single, together = (network.state_dict() for network in merged)
    for name, weight in together.items():
        torch.testing.assert_close(
            weight, sum(s[name] - before[name] for s in single) + before[name], rtol=0, atol=1e-5
        )
    full, name = golden_model("stage_c_small")[0], "up_blocks.0.2.attention.attn.in_proj_weight"
    merge_loras(full, [(loras[1][0], 1.0)])
    torch.testing.assert_close(single[1][name] - before[name], before[name] - full.state_dict()[name])


# ---------------------------------------------------------------- the reference's file


def test_a_file_of_the_reference_computes_the_golden_numbers(tmp_path):
    spec, tensors = load_case("lora_stage_c")
    network = StageC(**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors))
    inputs = {name: tensors[key] for name, key in spec["inputs"].items()}
    numbered = {key.removeprefix("lora."): t for key, t in tensors.items() if key.startswith("lora.weights.")}
    save_file(numbered, tmp_path / "reference.safetensors")
    torch.save(numbered, tmp_path / "reference.pt")
    for name in ("reference.safetensors", "reference.pt"):
        lora = read_lora(tmp_path / name, network, spec["module_filters"])
    assert_same(to_reference(lora, places(network), {}), numbered)
    merge_loras(network, [(lora, 1.0)])
    with torch.no_grad():
        drawn = network(**inputs)
    atol = spec["suggested_atol_with_the_same_r_embedding"]
    torch.testing.assert_close(drawn, tensors["out.with_lora"], rtol=0, atol=atol)


def test_the_published_example_has_our_numbers_and_shapes():
    spec = load_manifest("lora_stage_c_3.6B_attn_rank4")
    with torch.device("meta"):
        network = StageC()
        add_adapters(network, spec["module_filters"], LoraSettings(rank=4, alpha=1, init="published"))
    ids = spec["retrained_token_indices"]
    tokens = [Token(name, i, ()) for name, i in zip(spec["retrained_tokens"], ids, strict=True)]
    lora = lora_of(network, TokenRows(tokens, torch.zeros(1, 1280)))
    remove_adapters(network)
    tensors = to_reference(lora, places(network), dict(zip(lora.tokens, ids, strict=True)))
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert tensors["embeddings.indices"].tolist() == ids


def test_tokens_go_to_the_reference_and_back_by_their_ids(tmp_path):
    entries = [("^snail", None), ("[fernando]", "^dogs?</w>")]
    tower, network = word_tower(), adapted("attention")
    rows = train_tokens(tower, entries)
    rows.delta.data.normal_()
    lora, plain = lora_of(network, rows), golden_model("stage_c_small")[0]
    write_lora(lora, tmp_path / "r.safetensors", "reference", plain, word_tower().tokenizer)
    assert load_file(tmp_path / "r.safetensors")["embeddings.indices"].tolist() == [7, 10]
    with pytest.raises(LoraFileError, match=r"tokens \[7, 10\] without naming them: give the train_tokens"):
        read_lora(tmp_path / "r.safetensors", plain)
    back = read_lora(tmp_path / "r.safetensors", plain, rows=train_tokens(word_tower(), entries))
    assert back.tokens == ["snail</w>", "[fernando]"]
    assert_same(to_tensors(back), to_tensors(lora))


def test_what_the_reference_cannot_express_is_refused(tmp_path):
    plain, _, _ = golden_model("stage_c_small")
    for kind, said in {
        "DoRA": "with DoRA.*use lora-merged", "separate q, k, v": r"attn\.q alone.*use lora-merged",
        "convolutions": "one number per kernel.*use lora-merged",
    }.items():  # fmt: skip
        with pytest.raises(LoraFileError, match=said):
            write_lora(lora_of(adapted(kind)), tmp_path / "x.safetensors", "reference", plain)
    with pytest.raises(LoraFileError, match=r"depthwise convolution.*use lora-merged"):
        write_lora(lora_of(adapted("convolutions")), tmp_path / "x", "peft")


# ---------------------------------------------------------------- ComfyUI

# ComfyUI's StageC has the official module names, but its `process_unet_state_dict` splits every `in_proj_weight` into
# to_q, to_k and to_v (three equal parts of its rows, in this order). `model_lora_keys_unet` maps each parameter
# NAME.weight to `lora_unet_` and `lora_prior_unet_` + NAME with underscores for dots, and `load_lora` looks for
# KEY.lora_up.weight, KEY.lora_down.weight, KEY.alpha and KEY.dora_scale. Files that people share for Stage C use the
# second prefix; OneTrainer lists the same names as its own earlier format.
COMFYUI_NAMES = [
    f"lora_prior_unet_{block}_attention_attn_{layer}"
    for block in (
        "down_blocks_0_2",
        "down_blocks_1_2",
        "down_blocks_1_5",
        "up_blocks_0_2",
        "up_blocks_0_5",
        "up_blocks_1_2",
    )
    for layer in ("to_q", "to_k", "to_v", "out_proj")
]


def comfyui_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official weights under the names of ComfyUI's network."""
    split = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.+\.attn)\.in_proj_(weight|bias)", name):
            parts = zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True)
            split |= {f"{match[1]}.{part}.{match[2]}": rows for part, rows in parts}
        else:
            split[name] = tensor
    return split


@pytest.mark.parametrize("kind", ["attention", "separate q, k, v", "convolutions", "rank-stabilised"])
def test_comfyui_finds_every_tensor_and_gets_the_merged_weights(kind, tmp_path):
    lora = lora_of(adapted(kind))
    write_lora(lora, tmp_path / "c.safetensors", "comfyui")
    file = load_file(tmp_path / "c.safetensors")
    plain, _, _ = golden_model("stage_c_small")
    weights = comfyui_weights(plain.state_dict())
    keys = {
        f"lora_prior_unet_{n.removesuffix('.weight').replace('.', '_')}": n for n in weights if n.endswith(".weight")
    }
    used = set()
    for key, name in keys.items():
        if f"{key}.lora_up.weight" in file:
            up, down, alpha = (file[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            scale = alpha.item() / down.shape[0]
            weights[name] = weights[name] + scale * (up.flatten(1) @ down.flatten(1)).reshape(weights[name].shape)
            used |= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert used == file.keys()
    if kind == "attention":
        assert {name.partition(".")[0] for name in file} == set(COMFYUI_NAMES)
    merge_loras(plain, [(lora, 1.0)])
    for name, weight in comfyui_weights(plain.state_dict()).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def test_files_with_the_spellings_of_other_trainers_are_read(tmp_path):
    lora, plain = lora_of(adapted("attention")), golden_model("stage_c_small")[0]
    write_lora(lora, tmp_path / "c.safetensors", "comfyui")
    write_lora(lora, tmp_path / "p", "peft")
    file, peft_file = load_file(tmp_path / "c.safetensors"), load_file(tmp_path / "p" / "adapter_model.safetensors")

    def diffusers_underscores(name: str) -> str:  # OneTrainer's older files
        return name.replace("attn_out_proj", "to_out_0").replace("attention_attn_to", "attention_to")

    spellings = {
        "unet": {name.replace("lora_prior_unet_", "lora_unet_"): t for name, t in file.items()},
        "onetrainer": {diffusers_underscores(name): t for name, t in file.items()},
        "prior": {name.replace("base_model.model.", "prior."): t * 1 for name, t in peft_file.items()},
    }
    for spelling, tensors in spellings.items():
        save_file(tensors, tmp_path / f"{spelling}.safetensors")
        back = read_lora(tmp_path / f"{spelling}.safetensors", plain)
        assert_same(to_tensors(back), to_tensors(lora))
        alpha = 3 if spelling == "prior" else 2  # without an alpha the scale is 1
        assert {adapter.alpha for adapter in back.adapters.values()} == {alpha}


def test_tokens_become_embedding_files_of_comfyui(tmp_path):
    tower = word_tower()
    rows = train_tokens(tower, [("[fernando]", "^dog</w>"), ("snail", None)])
    rows.delta.data.normal_()
    written = write_lora(lora_of(adapted("attention"), rows), tmp_path / "dog.safetensors", "comfyui")
    assert [path.name for path in written] == ["dog.safetensors", "fernando.safetensors", "snail.safetensors"]
    row = load_file(written[1])["clip_g"]
    torch.testing.assert_close(row, (rows.initial + rows.delta)[:1].detach())


# ---------------------------------------------------------------- peft and diffusers


@pytest.mark.parametrize("kind", sorted(WHAT_FITS["peft"]))
def test_peft_loads_the_folder_into_diffusers_network_with_the_same_output(kind, tmp_path):
    network = adapted(kind)
    write_lora(lora_of(network), tmp_path / "folder", "peft")
    spec, tensors = load_case("stage_c_small")
    theirs = diffusers_network(spec["constructor"]).eval()
    theirs.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights_of(spec, tensors)))
    inputs = small_inputs()
    order = (inputs.pop("x"), inputs.pop("r"))
    with torch.no_grad():
        untouched = theirs(*order, **inputs, return_dict=False)[0]
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "folder")
        output = loaded(*order, **inputs, return_dict=False)[0]
        torch.testing.assert_close(output, network(*order, **inputs), rtol=1e-4, atol=1e-4)
    assert (output - untouched).abs().max() > 0.01


# ---------------------------------------------------------------- our own file


def test_our_file_says_rank_alpha_and_tokens_where_adapters_differ_by_name(tmp_path):
    one, two = adapted("attention"), adapted("convolutions", rank=2, alpha=7)
    lora = lora_of(one, train_tokens(word_tower(), [("[fernando]", "^dog</w>")]))
    about = metadata(lora)
    assert (about["rank"], about["alpha"], about["rank_stabilised"]) == ("3", "2", "false")
    assert json.loads(about["tokens"]) == ["[fernando]"]
    lora.adapters |= lora_of(two).adapters
    assert json.loads(metadata(lora)["rank"])["clf.1"] == 2
    write_lora(lora, tmp_path / "both.safetensors")
    back = read_lora(tmp_path / "both.safetensors", golden_model("stage_c_small")[0])
    assert_same(to_tensors(back), to_tensors(lora))
    assert {name: adapter.alpha for name, adapter in back.adapters.items()} == {
        name: adapter.alpha for name, adapter in lora.adapters.items()
    }


def test_drawing_takes_files_with_strengths_and_their_tokens(tmp_path, monkeypatch):
    tower, network = word_tower(), adapted("attention")
    rows = train_tokens(tower, [("[fernando]", "^dog</w>")])
    rows.delta.data.normal_()
    write_lora(lora_of(network, rows), tmp_path / "a.safetensors")
    write_lora(lora_of(adapted("convolutions", seed=1)), tmp_path / "b.safetensors")
    plain, fresh = golden_model("stage_c_small")[0], word_tower()
    small = replace(VERSIONS["mini"], stage_c=load_case("stage_c_small")[0]["constructor"])
    monkeypatch.setitem(VERSIONS, "mini", small)
    settings = ModelSettings(model_version="mini")
    loras = open_loras([f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors:0"], settings)
    with torch.no_grad():
        before = plain(**small_inputs())
        merge_loras(plain, loras)
        add_tokens(fresh, loras)
        torch.testing.assert_close(plain(**small_inputs()), network(**small_inputs()), rtol=1e-4, atol=1e-4)
        merge_loras(plain, open_loras([f"{tmp_path}/a.safetensors:-1"], settings))
        torch.testing.assert_close(plain(**small_inputs()), before, rtol=1e-4, atol=1e-4)
        (ours,), (theirs,) = (t.encode(*t.tokenize(["a picture of [fernando]"]))[0] for t in (tower, fresh))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(LoraFileError, match=r"\[fernando\] is in two of the LoRAs"):
        add_tokens(fresh, loras)
    assert [parse_lora(text)[1] for text in ("a:0.5", "a", "C:/a", "a:-1e1")] == [0.5, 1.0, 1.0, -10.0]
    assert str(parse_lora("C:/a.safetensors:2")[0]) == "C:/a.safetensors"
    for strength in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match=f"lora: a:{strength} is given with the strength {strength}; write"):
            parse_lora(f"a:{strength}")


def test_a_lora_for_another_network_says_what_differs(tmp_path):
    path = tmp_path / "lora.safetensors"
    small, _, _ = golden_model("stage_c_small")
    constructor = load_case("stage_c_small")[0]["constructor"]
    with torch.device("meta"):
        fewer = StageC(**constructor | {"blocks": [[1, 1], [1, 1]]})
        wider = StageC(**constructor | {"c_hidden": [128, 128], "c_cond": 128})
    write_lora(lora_of(adapted("attention")), path)
    with pytest.raises(LoraFileError, match=r"another network: this one has no layer down_blocks.1.5.attention.attn"):
        read_lora(path, fewer)
    with pytest.raises(LoraFileError, match=r"attn is \(192, 64\) in the file \(rank 3\) and \(384, 128\) here"):
        read_lora(path, wider)
    write_lora(lora_of(adapted("attention")), path, "reference", small)
    with pytest.raises(LoraFileError, match=r"another network: this one has no layer down_blocks.1.5.attention.attn"):
        read_lora(path, fewer)
    save_file(load_file(path), path)  # as the reference implementation writes it, without a word about it
    with pytest.raises(LoraFileError, match="12 numbered adapters, but 8 layers"):
        read_lora(path, fewer)
    write_lora(lora_of(adapted("attention")), path, "comfyui")
    with pytest.raises(LoraFileError, match="of a layer that this network does not have"):
        read_lora(path, fewer)
    rows = TokenRows([Token("[fernando]", 49408, ())], torch.zeros(1, 1280))
    with pytest.raises(LoraFileError, match="1280 wide, this text tower is 16"):
        add_tokens(word_tower(), [(lora_of(small, rows), 1.0)])
    with pytest.raises(LoraFileError, match="zebra</w> is not in this text tower's vocabulary"):
        add_tokens(word_tower(), [(lora_of(small, TokenRows([Token("zebra</w>", 3, ())], torch.zeros(1, 16))), 1.0)])


def test_what_is_no_lora_is_refused(tmp_path):
    network, _, _ = golden_model("stage_c_small")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraFileError, match="it is no LoRA: its tensors are named like 'weight'"):
        read_lora(tmp_path / "other.safetensors", network)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(LoraFileError, match="cannot be read"):
        read_lora(tmp_path / "broken.safetensors", network)
    lora = lora_of(adapted("attention"))
    tensors = to_tensors(lora)
    del tensors["down_blocks.0.2.attention.attn.lora.up"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(LoraFileError, match=r"down_blocks.0.2.attention.attn has no up: the file is not whole"):
        read_lora(tmp_path / "half.safetensors", network)
    for said in ("[dog]", "[1]", "{}"):
        save_file(to_tensors(lora), tmp_path / "tokens.safetensors", metadata={"tokens": said})
        with pytest.raises(LoraFileError, match=r"tokens\.safetensors: its metadata say tokens: .* no.* a JSON list"):
            read_lora(tmp_path / "tokens.safetensors", network)
    with pytest.raises(LoraFileError, match="no LoRA format 'onnx'"):
        write_lora(lora, tmp_path / "x", "onnx")


def test_new_tokens_count_on_from_clips_vocabulary(tmp_path):
    tokens = [Token("[one]", 49408, ()), Token("snail</w>", 24644, ()), Token("[two]", 49409, ())]
    lora = lora_of(adapted("attention"), TokenRows(tokens, torch.zeros(3, 8)))
    write_lora(lora, tmp_path / "r.safetensors", "reference", golden_model("stage_c_small")[0], BytePairTokenizer())
    ids = load_file(tmp_path / "r.safetensors")["embeddings.indices"].tolist()
    assert ids == [49408, BytePairTokenizer().encode("snail")[0], 49409]


@pytest.mark.parametrize("part", ["up", "down"])
def test_numbers_that_are_not_finite_are_refused_by_name(part, tmp_path):
    lora = lora_of(adapted("attention"))
    name = next(iter(lora.adapters))
    lora.adapters[name] = replace(
        lora.adapters[name], **{part: getattr(lora.adapters[name], part).detach() * torch.nan}
    )
    write_lora(lora, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match=f"x.safetensors: {re.escape(name)} holds numbers that are not finite"):
        read_lora(tmp_path / "x.safetensors", golden_model("stage_c_small")[0])
