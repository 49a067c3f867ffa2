"""Adapters against the reference implementation's numbers and against peft, and that they come and go exactly."""

import peft
import pytest
import torch
from torch import nn

from modules.blocks import AttnBlock, Conv, DepthwiseConv, MultiheadAttention, PointwiseConv
from modules.lora import (
    LoraSettings,
    adapters,
    add_adapters,
    merge,
    places,
    remove_adapters,
    unmerge,
    without_adapters,
)
from modules.stage_c import StageC
from tests.golden import ROUNDING, load_case, load_manifest, reference_outputs, relative_error, weights_of

GOLDEN = LoraSettings(rank=4, alpha=1)


class Alone(nn.Module):
    """A network of one layer, `layer`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer.eval()

    def forward(self, *inputs):
        return self.layer(*inputs)


def fill(adapter, down, up) -> None:
    adapter.down.data.copy_(down if adapter.down.dim() == 2 else down[:, :, None, None].expand_as(adapter.down))
    adapter.up.data.copy_(up)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with adapters that change something."""
    torch.manual_seed(seed)
    for _, _, adapter in adapters(network):
        for parameter in adapter.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("name", ["linear", "conv", "attention"])
def test_single_layers_compute_the_golden_numbers(name):
    spec, tensors = load_case("lora_layers")
    given = {key.removeprefix(f"in.{name}."): t for key, t in tensors.items() if key.startswith(f"in.{name}.")}
    expected = {key.removeprefix(f"out.{name}."): t for key, t in tensors.items() if key.startswith(f"out.{name}.")}
    layer = {"linear": nn.Linear(24, 40), "conv": Conv(6, 10, 3, padding=1), "attention": MultiheadAttention(32, 4)}
    network = Alone(layer[name])
    network.layer.load_state_dict({key: given[key] for key in network.layer.state_dict()})
    assert len(add_adapters(network, ["layer"], GOLDEN)) == (2 if name == "attention" else 1)
    for place_name, _, adapter in adapters(network):
        prefix = {"layer": "in_proj.", "layer.out_proj": "out_proj."}[place_name] if name == "attention" else ""
        fill(adapter, given[f"{prefix}lora_down"], given[f"{prefix}lora_up"])
    inputs = [given["query"], given["key_value"]] if name == "attention" else [given["x"]]
    inputs = [x.permute(0, 2, 3, 1) for x in inputs] if name == "conv" else inputs

    def check() -> None:
        output = network(*inputs)
        output = output.permute(0, 3, 1, 2) if name == "conv" else output
        torch.testing.assert_close(output, expected["output"], rtol=0, atol=spec["suggested_atol"])

    check()
    merge(network)
    check()
    effective = {key: t for key, t in expected.items() if key.startswith("effective")}
    assert len(effective) == len(list(adapters(network)))
    for place_name, place, _ in adapters(network):
        key = {"layer": "effective_in_proj_weight", "layer.out_proj": "effective_out_proj_weight"}
        key = key[place_name] if name == "attention" else "effective_weight"
        torch.testing.assert_close(place.weight, effective[key], rtol=0, atol=1e-6)


def test_a_whole_stage_c_computes_the_golden_numbers():
    (spec, tensors), reference = load_case("lora_stage_c"), reference_outputs()
    network = StageC(**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors))
    inputs = {name: tensors[key] for name, key in spec["inputs"].items()}
    add_adapters(network, spec["module_filters"], GOLDEN)
    atol = spec["suggested_atol_with_the_same_r_embedding"]
    with torch.no_grad():
        torch.testing.assert_close(network(**inputs), tensors["out.without_lora"], rtol=0, atol=atol)
        assert relative_error(network(**inputs), reference["lora_stage_c/without_lora"]) < ROUNDING
        numbered = {name: adapter for name, _, adapter in adapters(network)}
        targets = [name if place.parameter == "weight" else f"{name}.in_proj" for name, place, _ in adapters(network)]
        assert [f"{t}_weight" if t.endswith("in_proj") else f"{t}.weight" for t in targets] == [
            entry["target"] for entry in spec["order_of_weights"]
        ]
        for number, adapter in enumerate(numbered.values()):
            fill(adapter, *(tensors[f"lora.weights.{number}.lora_{part}"] for part in ("down", "up")))
        torch.testing.assert_close(network(**inputs), tensors["out.with_lora"], rtol=0, atol=atol)
        assert relative_error(network(**inputs), reference["lora_stage_c/with_lora"]) < ROUNDING
        with without_adapters(network):
            torch.testing.assert_close(network(**inputs), tensors["out.without_lora"], rtol=0, atol=atol)


def test_the_public_config_adapts_the_published_matrices():
    spec = load_manifest("lora_stage_c_3.6B_attn_rank4")
    with torch.device("meta"):
        network = StageC()
        names = add_adapters(network, spec["module_filters"], LoraSettings(rank=spec["rank"], alpha=spec["alpha"]))
    assert len(names) == len(spec["order_of_weights"]) == 128
    assert sum(p.numel() for _, _, adapter in adapters(network) for p in adapter.parameters()) == 3_145_728
    tensors = [(a.down, a.up) for _, _, a in adapters(network)]
    for number, (down, up) in enumerate(tensors):
        assert list(down.shape) == spec["tensors"][f"weights.{number}.lora_down"]["shape"]
        assert list(up.shape) == spec["tensors"][f"weights.{number}.lora_up"]["shape"]


def every_kind() -> nn.Module:
    torch.manual_seed(1)
    layers = {
        "linear": nn.Linear(12, 12), "pointwise": PointwiseConv(12, 12), "depthwise": DepthwiseConv(12, 3),
        "conv": Conv(12, 12, 3, padding=1), "attn": AttnBlock(12, 7, 2),
    }  # fmt: skip

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict(layers)

        def forward(self, x, tokens):
            for name, layer in self.layers.items():
                x = layer(x, None, None, tokens) if name == "attn" else layer(x)
            return x

    return Chain().eval()


INPUTS = (
    torch.randn(2, 4, 3, 12, generator=torch.Generator().manual_seed(2)),
    torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3)),
)
VARIANTS = {
    "plain": {},
    "split": {"split_qkv": True},
    "dora": {"dora": True},
    "split dora": {"dora": True, "split_qkv": True, "rank_stabilised": True},
}


@pytest.mark.bits
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_compute_the_same_and_unmerge_to_the_bit(variant):
    network = every_kind()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    untouched = network(*INPUTS)
    names = add_adapters(network, ["."], LoraSettings(rank=3, alpha=2, **VARIANTS[variant]))
    assert len(names) == (9 if "split" in variant else 7)
    torch.testing.assert_close(network(*INPUTS), untouched, rtol=0, atol=1e-6)  # an adapter starts without a change
    changed = randomised(network)(*INPUTS)
    assert (changed - untouched).abs().max() > 0.1
    merge(network)
    torch.testing.assert_close(network(*INPUTS), changed, rtol=1e-5, atol=1e-5)
    assert not torch.equal(network.layers["linear"].weight, before["layers.linear.weight"])
    unmerge(network)
    torch.testing.assert_close(network(*INPUTS), changed, rtol=0, atol=0)
    remove_adapters(network)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(network(*INPUTS), untouched)
    assert type(network.layers["linear"]) is nn.Linear


@pytest.mark.parametrize(
    "settings", [{}, {"rank_stabilised": True}, {"dora": True}], ids=["plain", "rank-stabilised", "dora"]
)
@pytest.mark.parametrize("kind", ["linear", "conv", "channels first"])
def test_outputs_and_gradients_are_those_of_peft(kind, settings):
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(10, 14), "conv": Conv(10, 14, 3, padding=1)}
    ours = Alone(layer.get(kind) or nn.Conv2d(10, 14, 3, padding=1))
    plain = nn.Linear(10, 14) if kind == "linear" else nn.Conv2d(10, 14, 3, padding=1)
    plain.load_state_dict(ours.layer.state_dict())
    config = peft.LoraConfig(
        r=3, lora_alpha=2, target_modules=["layer"],
        use_rslora=settings.get("rank_stabilised", False), use_dora=settings.get("dora", False),
    )  # fmt: skip
    theirs = peft.inject_adapter_in_model(config, Alone(plain))
    ours.requires_grad_(False)
    add_adapters(ours, ["layer"], LoraSettings(rank=3, alpha=2, **settings))
    ((_, _, adapter),) = adapters(randomised(ours))
    weights = dict(theirs.named_parameters())
    mine = {"layer.lora_A.default.weight": adapter.down, "layer.lora_B.default.weight": adapter.up}
    mine |= {"layer.lora_magnitude_vector.default.weight": adapter.magnitude} if settings.get("dora") else {}
    with torch.no_grad():
        for name, parameter in mine.items():
            weights[name].copy_(parameter.view_as(weights[name]))
    x = torch.randn(2, 5, 6, 10)
    output = ours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if kind == "channels first" else ours(x)
    expected = theirs(x if kind == "linear" else x.permute(0, 3, 1, 2))
    expected = expected if kind == "linear" else expected.permute(0, 2, 3, 1)
    torch.testing.assert_close(output, expected)
    for result in (output, expected):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, weights[name].grad.view_as(parameter), rtol=1e-4, atol=1e-4)
    assert ours.layer.weight.grad is None


def test_the_two_initialisations_start_without_a_change_and_learn():
    for init, zeros in (("zero_up", "up"), ("published", "down")):
        network = every_kind()
        add_adapters(network, ["."], LoraSettings(rank=3, alpha=3, init=init))
        network(*INPUTS).square().mean().backward()
        for _, _, adapter in adapters(network):
            zero, other = adapter.get_parameter(zeros), adapter.get_parameter({"up": "down", "down": "up"}[zeros])
            assert not zero.any()
            assert other.std() > 0.05
            assert zero.grad.abs().max() > 0
    assert 0.8 < torch.cat([a.up.flatten() for _, _, a in adapters(network)]).std() < 1.2


@pytest.mark.bits
def test_dropout_acts_on_the_side_path_and_only_in_training():
    network = every_kind()
    add_adapters(network, ["layers.linear"], LoraSettings(rank=3, alpha=3, dropout=0.5))
    randomised(network)
    assert torch.equal(network(*INPUTS), network(*INPUTS))
    network.train()
    assert not torch.equal(network(*INPUTS), network(*INPUTS))
    with without_adapters(network):
        assert torch.equal(network(*INPUTS), network(*INPUTS))


def test_bfloat16_weights_keep_float32_adapters():
    network = every_kind().to(torch.bfloat16)
    add_adapters(network, ["."], LoraSettings(rank=3, alpha=3, dora=True))
    assert {p.dtype for _, _, adapter in adapters(network) for p in adapter.parameters()} == {torch.float32}
    output = randomised(network)(*(x.to(torch.bfloat16) for x in INPUTS))
    assert output.dtype == torch.bfloat16
    exact = every_kind()
    add_adapters(exact, ["."], LoraSettings(rank=3, alpha=3, dora=True))
    torch.testing.assert_close(output.float(), randomised(exact)(*INPUTS), rtol=0.05, atol=0.1)


def test_a_filter_is_a_part_of_the_name_or_else_a_regular_expression():
    def chosen(*filters, **settings) -> list[str]:
        return add_adapters(every_kind(), filters, LoraSettings(rank=2, alpha=2, **settings))

    attention = ["layers.attn.attention.attn.out_proj", "layers.attn.attention.attn"]
    assert chosen(".attn.attention") == attention
    assert chosen(r"attn\.(q|v)$", split_qkv=True) == [f"{attention[1]}.q", f"{attention[1]}.v"]
    assert chosen("wise", "kv_mapper") == ["layers.pointwise", "layers.depthwise", "layers.attn.kv_mapper.1"]


def test_what_does_not_fit_is_refused_by_name():
    def refusal(filters, **settings) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            add_adapters(every_kind(), filters, LoraSettings(**({"rank": 2, "alpha": 2} | settings)))
        return str(error.value)

    message = refusal(["attn", "layers.depthwize"])
    assert "'layers.depthwize' finds no layer" in message
    assert "near names: layers.depthwise" in message
    assert "no regular expression" in refusal(["attn("])
    assert "no filter is given" in refusal([])
    assert "rank 13 is more than layers.linear has, a weight of 12 x 12" in refusal(["linear"], rank=13)
    assert "rank 10 is more than layers.depthwise has, a weight of 12 x 9" in refusal(["depthwise"], rank=10)
    assert places(every_kind()).keys() >= {"layers.attn.attention.attn"}
