"""Files of LoKr and LoHa: written, read, merged, gone on with, and added up by the rules of ComfyUI.

What LyCORIS itself computes with them is in tests/modules/test_lokr_loha.py and tests/families/test_readers.py.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.cascade.lora_files import read_lora, write_lora
from families.common.lora import adapters_of, add_adapters, merge_loras
from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats import Lora, LoraFileError
from families.common.lora_training import start_from
from modules.lora import LoraSettings, adapters
from tests.families.common.tiny_unets import SD15, SDXL, inputs, library_call, unet
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model, small_inputs

FILTERS = ["to_q", "ff.net.0", r"conv1$", "conv_shortcut"]
KINDS = {
    "LoKr": {"kind": "lokr", "rank": 2, "factor": 4},
    "LoKr both": {"kind": "lokr", "rank": 1, "decompose_both": True, "rank_stabilised": True},
    "LoKr whole": {"kind": "lokr", "rank": 2, "full_matrix": True},
    "LoHa": {"kind": "loha", "rank": 3},
}


def adapted(network: nn.Module, kind: str, filters=FILTERS, seed: int = 3, **settings) -> Lora:
    """Random adapters of a kind, whose alpha is not their rank; the network has them now."""
    add_adapters(network, filters, LoraSettings(alpha=1.5, **KINDS[kind] | settings))
    return Lora(adapters_of(randomised(network, seed)))


def same(found: Lora, expected: Lora) -> None:
    assert found.adapters.keys() == expected.adapters.keys()
    for place, adapter in expected.adapters.items():
        other = found.adapters[place]
        assert (other.kind, other.tensors.keys()) == (adapter.kind, adapter.tensors.keys())
        assert all(torch.equal(other.tensors[name], tensor) for name, tensor in adapter.tensors.items())
        assert other.scale == pytest.approx(adapter.scale)


@pytest.mark.parametrize("form", ["warpcore", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_files_come_back_to_the_bit_and_merge_to_what_was_trained(kind, form, tmp_path):
    trained, plain, given, path = unet(SDXL), unet(SDXL), inputs(SDXL), tmp_path / "x.safetensors"
    lora = adapted(trained, kind)
    write_loras({"unet": lora}, path, form, {"unet": trained})
    back = read_loras(path, {"unet": plain})["unet"]
    same(back, lora)
    untouched = library_call(plain, given)
    merge_loras(plain, [(back, 1.0)])
    output = library_call(plain, given)
    torch.testing.assert_close(output, library_call(trained, given), rtol=1e-4, atol=1e-4)
    assert (output - untouched).abs().max() > 0.01
    started = unet(SDXL)
    add_adapters(started, FILTERS, LoraSettings(alpha=0.5, **KINDS[kind]))
    start_from(back, started, None, path)  # at the file's strength, though alpha is another
    torch.testing.assert_close(library_call(started, given), output, rtol=1e-4, atol=1e-4)


def by_comfyui(file: dict[str, Tensor], layer: str, weight: Tensor) -> Tensor | None:
    """What ComfyUI adds to a weight for the tensors `LAYER.PART`: alpha is divided by the rank that a factor has."""
    own = {part: file.pop(f"{layer}.{part}") for part in [*PARTS, "alpha"] if f"{layer}.{part}" in file}
    if not own:
        return None
    if "hada_w1_a" in own:
        assert all(own[part].dim() == 2 for part in own.keys() - {"alpha"})  # it multiplies matrices alone
        product = torch.mm(own["hada_w1_a"], own["hada_w1_b"]) * torch.mm(own["hada_w2_a"], own["hada_w2_b"])
        return product.reshape(weight.shape) * (own["alpha"] / own["hada_w1_b"].shape[0])
    rank, halves = None, []
    for name in ("lokr_w1", "lokr_w2"):
        if name in own:
            halves.append(own[name])
        else:
            rank = own[f"{name}_b"].shape[0]
            halves.append(torch.mm(own[f"{name}_a"], own[f"{name}_b"]))
    first = halves[0][:, :, None, None] if halves[1].dim() == 4 else halves[0]
    product = torch.kron(first, halves[1]).reshape(weight.shape)
    return product if rank is None else product * (own["alpha"] / rank)


PARTS = [f"lokr_w{i}{end}" for i in "12" for end in ("", "_a", "_b")] + [
    f"hada_w{i}_{end}" for i in "12" for end in "ab"
]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_comfyui_adds_up_what_was_trained(kind, tmp_path):
    trained, plain, given, path = unet(SD15), unet(SD15), inputs(SD15), tmp_path / "x.safetensors"
    write_loras({"unet": adapted(trained, kind)}, path, "kohya", {"unet": trained})
    file = load_file(path)
    for name, module in plain.named_modules():
        if (weight := getattr(module, "weight", None)) is not None and weight.dim() > 1:
            change = by_comfyui(file, f"lora_unet_{name.replace('.', '_')}", weight)
            weight.data += 0 if change is None else change
    assert file == {}
    torch.testing.assert_close(library_call(plain, given), library_call(trained, given), rtol=1e-4, atol=1e-4)
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    assert about["ss_network_module"] == "lycoris.kohya"
    assert KINDS[kind]["kind"] in about["ss_network_args"]


@pytest.mark.parametrize("form", ["warpcore", "comfyui", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stage_c_has_an_adapter_for_each_of_queries_keys_and_values(kind, form, tmp_path):
    """Its depthwise convolutions too, which programs adapt alike."""
    trained, plain, path = *(golden_model("stage_c_small")[0].eval() for _ in range(2)), tmp_path / "x.safetensors"
    lora = adapted(trained, kind, [".attn", "depthwise", "channelwise"], rank=1)
    assert sum(place.endswith((".attn.q", ".attn.k", ".attn.v")) for place in lora.adapters) % 3 == 0
    write_lora(lora, path, form)
    names = {"warpcore": "attn.lora.q.", "comfyui": "lora_prior_unet_", "kohya": "attention_attn_to_q."}[form]
    assert any(names in name for name in load_file(path))
    back = read_lora(path, plain)
    same(back, lora)
    merge_loras(plain, [(back, 1.0)])
    torch.testing.assert_close(plain(**small_inputs()), trained(**small_inputs()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_kinds_add_up_with_their_strengths(tmp_path):
    weight, plain = unet(SD15).state_dict(), unet(SD15)
    loras = [(adapted(unet(SD15), kind, seed=seed), strength) for kind, seed, strength in
             (("LoKr", 1, 0.5), ("LoHa", 2, -0.25), ("LoKr whole", 3, 1.0))]  # fmt: skip
    merge_loras(plain, loras)
    for place in loras[0][0].adapters:
        name = f"{place}.weight"
        change = sum(lora.adapters[place].product * strength for lora, strength in loras)
        torch.testing.assert_close(plain.state_dict()[name], weight[name] + change.view_as(weight[name]))


def test_forms_without_names_for_them_refuse_them(tmp_path):
    lora, network = adapted(unet(SD15), "LoKr"), unet(SD15)
    with pytest.raises(
        LoraFileError,
        match="adapted with LoKr, which peft's form does not have: use lora-kohya, lora-comfyui or lora, ",
    ):
        write_loras({"unet": lora}, tmp_path / "x.safetensors", "diffusers", {"unet": network})
    stage_c = golden_model("stage_c_small")[0]
    lora = adapted(stage_c, "LoHa", ["channelwise"])
    for form, program in (("peft", "peft's form"), ("reference", "the reference's"), ("onetrainer", "OneTrainer's")):
        with pytest.raises(LoraFileError, match=f"adapted with LoHa, which {program}"):
            write_lora(lora, tmp_path / "x.safetensors", form, stage_c)


def test_a_run_starts_from_the_kind_that_it_trains(tmp_path):
    lora, path = adapted(unet(SD15), "LoHa"), tmp_path / "x.safetensors"
    for kind, said in (("LoKr", "it is a LoHa in the file and a LoKr in this run: write adapter: loha"),
                       ("LoHa", r"hada_w1_a is \(16, 3\) in the file and \(16, 2\) in this run")):  # fmt: skip
        network = unet(SD15)
        add_adapters(network, FILTERS, LoraSettings(alpha=1, **KINDS[kind] | {"rank": 2}))
        with pytest.raises(LoraFileError, match=said):
            start_from(lora, network, None, path)


def test_a_file_for_another_network_is_refused(tmp_path):
    lora, path = adapted(unet(SD15), "LoKr whole", ["to_q"]), tmp_path / "x.safetensors"
    write_loras({"unet": lora}, path, "kohya", {"unet": unet(SD15)})
    wider = unet(SD15 | {"block_out_channels": (16, 48)})
    with pytest.raises(LoraFileError, match=r"is 32 x 32 in the file \(LoKr\) and \(48, 48\) here"):
        read_loras(path, {"unet": wider})
    tensors = load_file(path)
    save_file(tensors | {name: t * float("nan") for name, t in tensors.items() if "w2" in name}, path)
    with pytest.raises(LoraFileError, match="not finite"):
        read_loras(path, {"unet": unet(SD15)})
    save_file(tensors | {name: t * float("nan") for name, t in tensors.items() if "alpha" in name}, path)
    with pytest.raises(LoraFileError, match=r"alpha of .* is nan"):
        read_loras(path, {"unet": unet(SD15)})
    assert list(adapters(wider)) == []
