"""LoRA files by the rules of other programs: their names and shapes, and the weights that follow from them.

Each rule is written down here on its own, without our tables of names: what a program calls a weight of Stage C, which
tensors it looks for, and how it adds them to the weight.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.cascade.lora_files import read_lora, write_lora
from families.cascade.lora_formats import LoraFileError, to_reference
from families.common.lora import merge_loras
from families.common.lora_training import lora_of
from modules.lora import LoraSettings, add_adapters, places
from modules.stage_c import StageC
from tests.golden import load_case
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model

ATTENTION = "down_blocks.1.2.attention.attn"
LINEAR = "up_blocks.0.0.channelwise.0"
CONVOLUTION = "clf.1"


def plain() -> StageC:
    return golden_model("stage_c_small")[0]


def adapted(*filters: str, **settings) -> StageC:
    network = plain()
    add_adapters(network, filters, LoraSettings(**{"rank": 3, "alpha": 2} | settings))
    return randomised(network, 0)


def in_three(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with queries, keys and values apart, as kohya's scripts, ComfyUI and diffusers keep them."""
    weights = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.+\.attn)\.in_proj_weight", name):
            weights |= {f"{match[1]}.to_{part}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        elif name.endswith(".weight"):
            weights[name.removesuffix(".weight")] = tensor
    return weights


def merged(network: StageC, path) -> dict[str, Tensor]:
    merge_loras(network, [(read_lora(path, network), 1.0)])
    return in_three(network.state_dict())


# ---------------------------------------------------------------- what we write

LAYERS = {
    "attention": [".attn"],
    "linear layers": ["channelwise", "mapper"],
    "convolutions of one pixel": ["embedding.1", "clf.1", "scalers"],
}
RULES = {
    # kohya: the whole name flat behind lora_unet_; a module is made for each lora_down. No grouped convolution.
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    # ComfyUI: the same, behind lora_unet_ or lora_prior_unet_.
    "comfyui": lambda name: "lora_prior_unet_" + name.replace(".", "_"),
    # OneTrainer: its earlier names, which its files for ComfyUI have too.
    "onetrainer": lambda name: "lora_prior_unet_" + name.replace(".", "_"),
}


@pytest.mark.parametrize("program", RULES)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_program_finds_every_tensor_under_its_names_and_adds_what_the_lora_changes(program, layers, tmp_path):
    network = adapted(*LAYERS[layers])
    write_lora(lora_of(network), tmp_path / "x.safetensors", program)
    file, weights = load_file(tmp_path / "x.safetensors"), in_three(plain().state_dict())
    expected = plain()
    merge_loras(expected, [(lora_of(network), 1.0)])
    for name, weight in in_three(expected.state_dict()).items():
        down, up, alpha = (file.pop(f"{RULES[program](name)}.{part}", None)
                           for part in ("lora_down.weight", "lora_up.weight", "alpha"))  # fmt: skip
        if down is None:
            assert torch.equal(weight, weights[name])
            continue
        rank = down.shape[0]
        assert down.shape == (rank, *weight.shape[1:])
        assert up.shape == (weight.shape[0], rank, *[1] * (weight.dim() - 2))
        assert alpha.shape == ()
        change = (up.flatten(1) @ down.flatten(1)).view_as(weight) * (alpha / rank)
        torch.testing.assert_close(weights[name] + change, weight, rtol=1e-5, atol=1e-6)
    assert not file


@pytest.mark.parametrize("program", ["comfyui", "onetrainer"])
def test_dora_has_a_length_for_each_row(program, tmp_path):
    lora, expected = lora_of(adapted("channelwise.0", "clf.1", dora=True)), plain()
    write_lora(lora, tmp_path / "x.safetensors", program)
    file, weights = load_file(tmp_path / "x.safetensors"), in_three(plain().state_dict())
    merge_loras(expected, [(lora, 1.0)])
    for name in (LINEAR, CONVOLUTION):
        key = RULES[program](name)
        down, up, lengths = (file[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "dora_scale"))
        assert lengths.shape == (len(up), *[1] * (down.dim() - 1))
        changed = weights[name] + (up.flatten(1) @ down.flatten(1)).view_as(weights[name]) * (2 / 3)
        norm = changed.flatten(1).norm(dim=1).view_as(lengths)
        torch.testing.assert_close(lengths * changed / norm, in_three(expected.state_dict())[name])


def test_what_a_program_does_not_read_is_refused(tmp_path):
    for program, settings, said in (
        ("kohya", {"dora": True}, "adapted with DoRA, which kohya's scripts do not read: use lora-merged"),
        ("kohya", {}, "depthwise convolution, which kohya adapts differently"),
        ("onetrainer", {}, "depthwise convolution, which onetrainer adapts differently"),
    ):
        with pytest.raises(LoraFileError, match=said):
            write_lora(lora_of(adapted("depthwise" if not settings else "clf.1", **settings)), tmp_path / "x", program)


# ---------------------------------------------------------------- what others write

# The same attention layer and the same convolution, in the names of each program.
SPELLINGS = {
    "kohya": ("lora_unet_down_blocks_1_2_attention_attn_to_{}", "lora_unet_clf_1"),
    "ComfyUI": ("lora_prior_unet_down_blocks_1_2_attention_attn_to_{}", "lora_prior_unet_clf_1"),
    "OneTrainer, dotted": ("unet.down_blocks.1.2.attention.attn.in_proj.{#}", "unet.clf.1"),
    "OneTrainer, flat": ("lora_prior_unet_down_blocks_1_2_attention_attn_in_proj_{#}", "lora_prior_unet_clf_1"),
    "OneTrainer, diffusers": ("lora_prior_unet.down_blocks.1.2.attention.to_{}", "lora_prior_unet.clf.1"),
    "OneTrainer, earlier": ("lora_prior_unet_down_blocks_1_2_attention_to_{}", "lora_prior_unet_clf_1"),
    "diffusers": ("prior.down_blocks.1.2.attention.to_{}", "prior.clf.1"),
    "LyCORIS": ("lycoris_down_blocks_1_2_attention_attn_to_{}", "lycoris_clf_1"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_names_of_each_program_are_read(spelling, tmp_path):
    attention, convolution = SPELLINGS[spelling]
    torch.manual_seed(0)
    weights, tensors, expected = in_three(plain().state_dict()), {}, {}
    keys = {f"{ATTENTION}.to_{part}": attention.replace("{#}", str(i)).replace("{}", part)
            for i, part in enumerate("qkv")} | {CONVOLUTION: convolution}  # fmt: skip
    for name, key in keys.items():
        weight, kernel = weights[name], [1] * (weights[name].dim() - 2)
        down, up = torch.randn(4, *weight.shape[1:]), torch.randn(weight.shape[0], 4, *kernel)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        expected[name] = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight) * (2 / 4)
    save_file(tensors, tmp_path / "x.safetensors")
    for name, weight in merged(plain(), tmp_path / "x.safetensors").items():
        torch.testing.assert_close(weight, expected.get(name, weights[name]), rtol=1e-5, atol=1e-6)


def onetrainers_dora(path, *names: str) -> dict[str, Tensor]:
    """Write a file with OneTrainer's DoRA, by default with a length for each input column; returns the weights."""
    torch.manual_seed(0)
    weights, tensors, expected = in_three(plain().state_dict()), {}, {}
    for name in names:
        weight = weights[name]
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(weight.shape[0], 2, *[1] * (weight.dim() - 2))
        changed = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight) / 2
        columns = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.dim() - 2))
        lengths = torch.rand_like(columns) + 0.5
        key = RULES["onetrainer"](name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0),
                    f"{key}.dora_scale": lengths}  # fmt: skip
        expected[name] = lengths * changed / columns
    save_file(tensors, path)
    return expected


def test_dora_by_input_columns_is_read_as_onetrainer_means_it(tmp_path):
    queries, keys, values = (f"{ATTENTION}.to_{part}" for part in "qkv")
    path = tmp_path / "x.safetensors"
    expected = onetrainers_dora(path, queries, keys, values, LINEAR, CONVOLUTION)
    weights = in_three(plain().state_dict())
    for name, weight in merged(plain(), path).items():
        torch.testing.assert_close(weight, expected.get(name, weights[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["warpcore", "onetrainer", "comfyui"])
def test_dora_by_input_columns_comes_back_from_the_formats_that_hold_it(form, tmp_path):
    expected = onetrainers_dora(tmp_path / "x.safetensors", LINEAR, CONVOLUTION)
    write_lora(read_lora(tmp_path / "x.safetensors", plain()), tmp_path / "y.safetensors", form)
    after = merged(plain(), tmp_path / "y.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5)


def test_dora_by_input_columns_is_refused_where_it_means_something_else(tmp_path):
    onetrainers_dora(tmp_path / "x.safetensors", LINEAR)
    lora = read_lora(tmp_path / "x.safetensors", plain())
    for form, said in (
        ("kohya", "kohya's scripts do not read"), ("peft", "by input columns"), ("reference", "which the reference"),
    ):  # fmt: skip
        with pytest.raises(LoraFileError, match=said):
            write_lora(lora, tmp_path / "out", form, plain())


def test_a_tucker_decomposition_of_lycoris_is_read(tmp_path):
    """LyCORIS' change of a convolution: for each kernel position, up @ mid[:, :, y, x] @ down."""
    torch.manual_seed(0)
    weight = in_three(plain().state_dict())[CONVOLUTION]
    down, mid = torch.randn(4, weight.shape[1], 1, 1), torch.randn(4, 4, *weight.shape[2:])
    up = torch.randn(weight.shape[0], 4, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_clf_1.{part}": t for part, t in tensors.items()}, tmp_path / "x.safetensors")
    change = up[:, :, 0, 0] @ mid[:, :, 0, 0] @ down[:, :, 0, 0] * (2 / 4)
    after = merged(plain(), tmp_path / "x.safetensors")[CONVOLUTION]
    torch.testing.assert_close(after, weight + change.view_as(weight))


NOT_READ = {
    "lora_unet_clf_1.lokr_t1": "belongs to no adapter",
    "lora_unet_clf_1.oft_blocks": "part of an OFT adapter",
    "lora_unet_clf_1.a1.weight": "part of a GLoRA",
    "lora_unet_clf_1.diff": "the whole change of a weight or a bias",
    "lora_unet_clf_1.diff_b": "the whole change of a weight or a bias",
    "lora_unet_clf_1.w_norm": "the whole change of a weight or a bias",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "part of a LoRA of the text encoder",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "part of a LoRA of the text encoder",
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "part of a LoRA of the text encoder",
    "clip_g.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": "part of a LoRA of the text encoder",
    "bundle_emb.[dog].clip_g_out": "Stable Cascade's text encoder has no place for",
    "prior.clf.1.lora_B.bias": "a bias inside an adapter",
    "prior.clf.1.bias": "belongs to no adapter",
    "something_else": "belongs to no adapter",
    "lora_unet_clf_1.lora_middle.weight": "belongs to no adapter",
}


@pytest.mark.parametrize("name", NOT_READ)
def test_no_tensor_is_left_out_without_a_word(name, tmp_path):
    write_lora(lora_of(adapted("clf.1")), tmp_path / "x.safetensors", "kohya")
    save_file(load_file(tmp_path / "x.safetensors") | {name: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match=f"x.safetensors: it holds {re.escape(name)}, .*{NOT_READ[name]}"):
        read_lora(tmp_path / "x.safetensors", plain())


def test_no_tensor_of_our_files_and_the_references_is_left_out_without_a_word(tmp_path):
    for form, name in (("warpcore", "clf.1.lora.middle"), ("reference", "weights.0.lora_middle")):
        write_lora(lora_of(adapted("clf.1")), tmp_path / "x.safetensors", form, plain())
        save_file(load_file(tmp_path / "x.safetensors") | {name: torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(LoraFileError, match=f"it holds {name}, which"):
            read_lora(tmp_path / "x.safetensors", plain())


# ---------------------------------------------------------------- the reference implementation

# Its network makes the layers in this order: what it numbers follows, children before their parent.
REFERENCE_ORDER = [
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding.1",
    "down_blocks.0.2.attention.attn.out_proj", "down_blocks.0.2.attention.attn",
    "down_blocks.1.2.attention.attn.out_proj", "down_blocks.1.2.attention.attn",
    "down_blocks.1.5.attention.attn.out_proj", "down_blocks.1.5.attention.attn",
    "down_downscalers.1.1.blocks.0",
    "up_blocks.0.2.attention.attn.out_proj", "up_blocks.0.2.attention.attn",
    "up_blocks.0.5.attention.attn.out_proj", "up_blocks.0.5.attention.attn",
    "up_blocks.1.2.attention.attn.out_proj", "up_blocks.1.2.attention.attn",
    "up_upscalers.0.1.blocks.1", "clf.1",
]  # fmt: skip
FILTERS = [".attn", "clip_", "embedding.1", "scalers", "clf"]


def test_numbers_follow_the_walk_of_the_reference_also_between_the_levels(tmp_path):
    # Every kernel here is of one pixel, and each adapter holds its place's number in REFERENCE_ORDER.
    network = adapted(*FILTERS, rank=1, alpha=1)
    lora = lora_of(network)
    for i, name in enumerate(REFERENCE_ORDER):
        lora.adapters[name].up.fill_(i)
    tensors = to_reference(lora, places(plain()), {})
    assert [tensors[f"weights.{i}.lora_up"].unique().item() for i in range(len(tensors) // 2)] == [*range(19)]
    save_file(tensors, tmp_path / "theirs.safetensors")
    back = read_lora(tmp_path / "theirs.safetensors", plain(), FILTERS)
    assert {name: adapter.up.unique().item() for name, adapter in back.adapters.items()} == {
        name: i for i, name in enumerate(REFERENCE_ORDER)
    }


def test_our_numbered_files_name_their_layers_and_earlier_ones_keep_their_order(tmp_path):
    lora = lora_of(adapted(*FILTERS))
    path = tmp_path / "x.safetensors"
    write_lora(lora, path, "reference", plain())
    assert all(torch.equal(read_lora(path, plain()).adapters[name].up, a.up) for name, a in lora.adapters.items())
    # Until now the layers between the levels came first, and only rank and alpha were said.
    earlier = [name for name in places(plain()) if name in lora.adapters]
    assert earlier.index("down_downscalers.1.1.blocks.0") < earlier.index("down_blocks.0.2.attention.attn")
    tensors = {}
    for i, name in enumerate(earlier):
        adapter = lora.adapters[name]
        tensors[f"weights.{i}.lora_down"] = adapter.down.flatten(1)
        tensors[f"weights.{i}.lora_up"] = adapter.up * 2
    save_file(tensors, path, metadata={"rank": "3", "alpha": "2", "rank_stabilised": "false", "tokens": "[]"})
    back = read_lora(path, plain(), FILTERS)
    assert all(torch.equal(back.adapters[name].up, adapter.up) for name, adapter in lora.adapters.items())


def test_the_golden_network_has_the_order_of_the_golden_file():
    spec = load_case("lora_stage_c")[0]
    with torch.device("meta"):
        network = StageC(**spec["constructor"])
        add_adapters(network, spec["module_filters"], LoraSettings(rank=1, alpha=1))
    found = to_reference(lora_of(network), places(StageC(**spec["constructor"])), {})
    shapes = dict(network.named_parameters())
    for entry in spec["order_of_weights"]:
        assert len(found[f"weights.{entry['index']}.lora_up"]) == len(shapes[entry["target"]])
