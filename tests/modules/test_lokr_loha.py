"""LoKr and LoHa: LyCORIS's own outputs (tests/golden/lycoris.json), their formulas, that they come and go exactly."""

import pytest
import torch
from torch import Tensor, nn

from families.common.lora import merge_loras
from families.common.lora_formats import Lora
from families.common.lora_formats.named import from_named
from modules.blocks import Conv, DepthwiseConv, PointwiseConv
from modules.float8 import keep_in_float8
from modules.int8 import keep_in_int8
from modules.lokr import factorised
from modules.lora import LoraSettings, adapters, add_adapters, merge, places, remove_adapters, unmerge
from modules.quantise import quantise
from tests.golden import load_case
from tests.modules.test_lora import INPUTS, Alone, every_kind, randomised

SPEC, TENSORS = load_case("lycoris")
CASES = SPEC["cases"]
TRAINED = [name for name in CASES if not name.endswith(("tucker", "dora", "columns"))]
KINDS = {
    "LoKr": {"kind": "lokr", "rank": 2, "factor": 3},
    "LoKr both": {"kind": "lokr", "rank": 1, "decompose_both": True},
    "LoKr whole": {"kind": "lokr", "rank": 8, "full_matrix": True},
    "LoHa": {"kind": "loha", "rank": 2},
    "LoHa of full rank": {"kind": "loha", "rank": 5},
}


def of_case(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in TENSORS.items() if key.startswith(f"{name}.")}


def settings_of(case: dict) -> LoraSettings:
    own = {key: case[key] for key in ("kind", "factor", "decompose_both", "full_matrix") if key in case}
    return LoraSettings(case["lora_dim"], case["alpha"], case.get("rs_lora", False), **own)


def layer_of(name: str, channels_last: bool = True) -> Alone:
    """A layer of a case, as this project builds it or as PyTorch does."""
    given = of_case(name)
    (rows, columns, *kernel), strided = given["weight"].shape, {"padding": 1, "stride": 2}
    made = {
        "linear": lambda: nn.Linear(columns, rows),
        "convolution": lambda: (Conv if channels_last else nn.Conv2d)(columns, rows, kernel, **strided),
        "depthwise": lambda: DepthwiseConv(rows, 3) if channels_last else nn.Conv2d(rows, rows, 3, 1, 1, groups=rows),
        "pointwise": lambda: PointwiseConv(columns, rows) if channels_last else nn.Conv2d(columns, rows, 1),
    }[name]()
    made.load_state_dict({key: given[key].view_as(made.state_dict()[key]) for key in ("weight", "bias")})
    return Alone(made).requires_grad_(False)


def output_of(network: Alone, x: Tensor, channels_last: bool = True) -> Tensor:
    if x.dim() == 4 and channels_last:
        return network(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return network(x)


def read(name: str) -> Lora:
    """The adapter of a case, from tensors as LyCORIS names them in files."""
    file = {f"lycoris_layer.{key}": t for key, t in of_case(name).items() if key != "output"}
    found = from_named(file, {"layer": "layer"}, {}, prefix="lycoris_", not_read={}, weights=())
    return Lora(found)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_computes_what_lycoris_computes_with_the_same_factors(name, channels_last):
    case, given = CASES[name], of_case(name)
    if case["layer"] == "linear" and not channels_last:
        pytest.skip("a matrix has no other order")
    network = layer_of(case["layer"], channels_last)
    x, plain = (of_case(case["layer"])[key] for key in ("x", "plain"))
    add_adapters(network, ["layer"], settings_of(case))
    torch.testing.assert_close(output_of(network, x, channels_last), plain, rtol=0, atol=1e-5)
    ((_, _, adapter),) = adapters(network)
    factors = {key: t for key, t in given.items() if key not in ("alpha", "output")}
    assert {key: t.shape for key, t in adapter.tensors.items()} == {key: t.shape for key, t in factors.items()}
    with torch.no_grad():
        for key, factor in adapter.tensors.items():
            factor.copy_(factors[key])
    torch.testing.assert_close(output_of(network, x, channels_last), given["output"], rtol=1e-5, atol=1e-5)
    merge(network)
    torch.testing.assert_close(output_of(network, x, channels_last), given["output"], rtol=1e-5, atol=1e-5)
    unmerge(network)
    remove_adapters(network)
    torch.testing.assert_close(output_of(network, x, channels_last), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_lycoris_wrote_is_read_and_merged_to_what_it_computes(name):
    case, given = CASES[name], of_case(name)
    network, lora = layer_of(case["layer"]), read(name)
    assert lora.adapters["layer"].kind == case["kind"]
    merge_loras(network, [(lora, 1.0)])
    found = output_of(network, of_case(case["layer"])["x"])
    torch.testing.assert_close(found, given["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_adapted_and_merged(kind):
    """Attention's queries, keys and values get an adapter each."""
    network = every_kind()
    before, untouched = {name: t.clone() for name, t in network.state_dict().items()}, network(*INPUTS)
    names = add_adapters(network, ["."], LoraSettings(alpha=2, **KINDS[kind]))
    assert set(names) == places(network, split_qkv=True).keys()
    torch.testing.assert_close(network(*INPUTS), untouched, rtol=0, atol=1e-6)  # they start without a change
    changed = randomised(network)(*INPUTS)
    assert (changed - untouched).abs().max() > 0.1
    merge(network)
    torch.testing.assert_close(network(*INPUTS), changed, rtol=1e-4, atol=1e-4)
    unmerge(network)
    remove_adapters(network)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_changed_weight(kind):
    """By autograd through the formula: torch.kron and the products, in a layer without an adapter."""
    torch.manual_seed(0)
    network, x = Alone(nn.Linear(12, 18)).requires_grad_(False), torch.randn(4, 12)
    add_adapters(network, ["layer"], LoraSettings(alpha=3, **KINDS[kind]))
    ((_, _, adapter),) = adapters(randomised(network))
    own = {name: factor.detach().clone().requires_grad_() for name, factor in adapter.tensors.items()}
    if kind.startswith("LoHa"):
        product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
        product = torch.kron(first, second)
    scale = 1 if kind == "LoKr whole" else 3 / KINDS[kind]["rank"]
    layer = network.layer
    expected = nn.functional.linear(x, layer.weight + scale * product, layer.bias)
    output = network(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for result in (output, expected):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    for name, factor in adapter.tensors.items():
        torch.testing.assert_close(factor.grad, own[name].grad, rtol=1e-4, atol=1e-5)


PACKED = {
    "float8": lambda network: keep_in_float8(network, torch.float8_e4m3fn, "cpu"),
    "int8": lambda network: keep_in_int8(network, "cpu", rotate=True),
    "nf4": lambda network: quantise(network, "cpu"),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_eight_or_four_bits_are_adapted(kind, packed):
    """Nothing looks at them: the change comes beside what the layer makes."""
    torch.manual_seed(0)
    network, x = Alone(nn.Linear(128, 128)).requires_grad_(False), torch.randn(3, 128)
    PACKED[packed](network)
    plain = network(x)
    add_adapters(network, ["layer"], LoraSettings(alpha=1, **KINDS[kind]))
    ((_, _, adapter),) = adapters(randomised(network))
    change = nn.functional.linear(x, adapter.scale * adapter.product(adapter.tensors))
    torch.testing.assert_close(network(x), plain + change, rtol=1e-4, atol=1e-4)
    network(x).square().mean().backward()
    assert all(factor.grad.abs().max() > 0 for factor in adapter.parameters())


def test_a_size_is_factorised_as_lycoris_does_it():
    """What `lycoris.functional.factorization` gave, for the factors -1, 2, 4, 8 and 16."""
    table = {
        127: [(1, 127)] * 5, 128: [(8, 16), (2, 64), (4, 32), (8, 16), (8, 16)],
        250: [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)], 360: [(18, 20), (2, 180), (4, 90), (8, 45), (15, 24)],
        512: [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)],
    }  # fmt: skip
    for size, expected in table.items():
        assert [factorised(size, factor) for factor in (-1, 2, 4, 8, 16)] == expected


def test_a_lokr_is_far_smaller_than_a_lora():
    def count(**settings) -> int:
        with torch.device("meta"):
            network = Alone(nn.Linear(1024, 1024))
            add_adapters(network, ["layer"], LoraSettings(alpha=1, **settings))
        return sum(p.numel() for _, _, adapter in adapters(network) for p in adapter.parameters())

    assert count(rank=16) == count(rank=8, kind="loha") == 16 * 2048
    assert count(rank=8, kind="lokr") == 32 * 32 + 8 * 2 * 32
    assert count(rank=8, kind="lokr", factor=8) == 8 * 8 + 8 * 2 * 128


def test_factors_that_do_not_go_together_are_refused_by_name():
    layer = {"lycoris_layer.alpha": torch.tensor(1.0)}

    def refusal(**tensors: Tensor) -> str:
        file = layer | {f"lycoris_layer.{name}": t for name, t in tensors.items()}
        with pytest.raises(ValueError) as error:  # noqa: PT011
            from_named(file, {"layer": "layer"}, {}, prefix="lycoris_", not_read={}, weights=())
        return str(error.value)

    two = torch.ones(2, 2)
    assert "either lokr_w2, or lokr_w2_a and lokr_w2_b" in refusal(lokr_w1=two)
    assert "lokr_w2_a has rank 2 and lokr_w2_b 3" in refusal(lokr_w1=two, lokr_w2_a=two, lokr_w2_b=torch.ones(3, 2))
    assert "either lokr_w1, or" in refusal(lokr_w1=two, lokr_w1_a=two, lokr_w1_b=two, lokr_w2=two)
    assert "it has no hada_w2_b" in refusal(hada_w1_a=two, hada_w1_b=two, hada_w2_a=two)
    halves = {"hada_w1_a": two, "hada_w1_b": two, "hada_w2_a": torch.ones(2, 1), "hada_w2_b": torch.ones(1, 2)}
    assert "four matrices do not go together" in refusal(**halves)
    assert "a part of another kind" in refusal(lokr_w1=two, lokr_w2=two, hada_w1_a=two)
    assert "lokr_t2 of layer does not go with" in refusal(lokr_w1=two, lokr_w2=two, lokr_t2=torch.ones(2, 2, 3, 3))
    assert "no matrix" in refusal(lokr_w1=two, lokr_w2=torch.ones(2))
