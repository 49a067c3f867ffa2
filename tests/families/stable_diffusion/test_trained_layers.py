"""The table in docs/stable_diffusion.md has what each flag of the reference trainer trains and starts from scratch."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tests.golden import load_case
from warpcore.from_scratch import Start, fresh_layers
from warpcore.parameter_groups import ParameterGroup, freeze

DOCS = Path(__file__).parents[3] / "docs/stable_diffusion.md"
GOLDEN = {row["flag"].removeprefix("--"): row for row in load_case("sd15_trained_layers")[0]["rows"]}
REST = ParameterGroup(pattern="*", frozen=True)
MISSED = {
    "reinit_crossattn": re.compile(r".*\.attn2\.to_out\..*"),
    "reinit_attention": re.compile(r".*\.attn[12]\.to_out\..*"),
}
"""What these mean to reset too, and do not, as their page says."""


def table() -> dict[str, tuple[list, list]]:
    """Entries of `parameter_groups` and of `start_from_scratch` by flag."""
    rows = re.findall(r"^\| `(\w+(?:_[\w ]+)?)` \| (.*?) \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    cells = {flag: [re.findall(r"`(\{.*?\})`", cell) for cell in own] for flag, *own in rows}
    return {flag: tuple([yaml.safe_load(one) for one in cell] for cell in own) for flag, own in cells.items()}


FLAGS = {flag: own for flag, own in table().items() if re.match("(unfreeze|reinit)_", flag)}


def network(**settings) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **settings)


@pytest.fixture(scope="module")
def unet_of_sd15() -> nn.Module:
    return network()


def test_every_flag_has_a_row():
    assert FLAGS.keys() == GOLDEN.keys()


@pytest.mark.parametrize("flag", GOLDEN)
def test_what_a_row_trains_and_resets_is_what_the_flag_does(unet_of_sd15, flag):
    (groups, starts), row = FLAGS[flag], GOLDEN[flag]
    unet_of_sd15.requires_grad_(True)
    networks, names = {"generator": unet_of_sd15}, [name for name, _ in unet_of_sd15.named_parameters()]
    freeze(networks, [*(ParameterGroup(**group) for group in groups), REST] if groups else [])
    layers = fresh_layers(networks, [Start(**start) for start in starts])
    found = {f"{layer.name}.{name}".removeprefix("generator.") for layer in layers for name in layer.starts}
    changed = re.compile(row.get("values_changed", {}).get("pattern", "$"))
    expected = {name for name in names if changed.fullmatch(name)}
    if flag in MISSED:
        assert not any(MISSED[flag].fullmatch(name) for name in expected)
        expected |= {name for name in names if MISSED[flag].fullmatch(name)}
    else:
        assert len(found) == row.get("changed_tensors", 0)
        sizes = [unet_of_sd15.get_parameter(name).numel() for name in found]
        assert sum(sizes) == row.get("changed_parameters_of_sd15", 0)
    assert found == expected
    trained = {name for name in names if unet_of_sd15.get_parameter(name).requires_grad}
    if row["trainable_tensors"]:
        pattern = re.compile(row["trainable_after_freezing_all"]["pattern"])
        assert trained == {name for name in names if pattern.fullmatch(name)}
        assert len(trained) == row["trainable_tensors"]
        sizes = [unet_of_sd15.get_parameter(name).numel() for name in trained]
        assert sum(sizes) == row["trainable_parameters_of_sd15"]
    else:  # the reference resets these layers, and leaves them frozen
        assert trained == found


@pytest.mark.parametrize("flag", [flag for flag, row in GOLDEN.items() if "values" in row])
def test_values_are_of_the_kind_that_the_flag_gives(flag):
    """A narrow network has the same 686 tensors."""
    _, starts = FLAGS[flag]
    narrow = {"generator": network(block_out_channels=(32, 64, 96, 96))}
    layers = fresh_layers(narrow, [Start(**start) for start in starts])
    kinds = Counter()
    for layer in layers:
        for full_name, values in layer.values(seed=0):
            name = full_name.rpartition(".")[2]
            fan_in = values[0].numel() if values.dim() > 1 else layer.shapes.weight[0].numel()
            bound = (6 / sum(values.shape)) ** 0.5 if values.dim() == 2 else None
            if not values.any():
                kinds["zeros"] += 1
            elif bool((values == 1).all()):
                kinds["ones"] += 1
            elif layer.starts[name].method == "default":
                assert values.abs().max() <= fan_in**-0.5
                assert name == "bias" or values.abs().max() > 0.8 * fan_in**-0.5
                kinds[f"default of the layer: {'bias ' * (name == 'bias')}uniform within 1/sqrt(inputs)"] += 1
            else:
                assert bound is None or 0.9 * bound < values.abs().max() <= bound
                kinds["xavier uniform"] += 1
    expected = Counter(GOLDEN[flag]["values"])
    if flag in MISSED:
        more = 16 if flag == "reinit_crossattn" else 32
        expected += Counter({"xavier uniform": more, "zeros": more})
    assert kinds == expected
