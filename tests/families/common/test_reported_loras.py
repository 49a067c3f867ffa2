"""LoRA files that other programs stumbled over, as their users reported it."""

import pytest
import torch
from safetensors.torch import save_file

from families.common.lora import merge_loras
from families.common.lora_files import read_loras
from families.common.lora_formats import LoraFileError
from tests.families.common.tiny_unets import SD15, unet

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"


def pair(layer: str, rank: int, width: int, names: tuple[str, str] = ("lora_down", "lora_up")) -> dict:
    generator = torch.Generator().manual_seed(rank)
    shapes = zip(names, ((rank, width), (width, rank)), strict=True)
    return {f"{layer}.{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes}


@pytest.fixture(scope="module")
def network():
    return unet(SD15)


@pytest.fixture(scope="module")
def width(network) -> int:
    return network.get_submodule(f"{LAYER}.to_q").in_features


@pytest.fixture
def read(network, tmp_path):
    def of(tensors: dict):
        save_file(tensors, tmp_path / "x.safetensors")
        return read_loras(tmp_path / "x.safetensors", {"unet": network})["unet"]

    return of


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_of_eight_bits_is_the_change_that_its_numbers_say(read, network, width, kind, tmp_path):
    """Source: nunchux-ai/nunchaku#245."""
    small = {name: tensor.to(kind) for name, tensor in pair(f"{KOHYA}_to_q", 2, width).items()}
    torch.save(small, tmp_path / "x.pt")
    lora = read_loras(tmp_path / "x.pt", {"unet": network})["unet"]
    for layer, adapter in read(small).adapters.items():
        assert torch.equal(adapter.down, lora.adapters[layer].down)
    same = read({name: tensor.float() for name, tensor in small.items()})
    networks = [unet(SD15) for _ in range(3)]
    for network, own in zip(networks, (lora, same, None), strict=True):
        merge_loras(network, [(own, 1.0)] if own else [])
    changed, expected, before = (one.get_submodule(f"{LAYER}.to_q").weight for one in networks)
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, before)


def test_ranks_may_differ_where_no_alpha_is_said(read, width):
    """Source: huggingface/diffusers#14409: alpha is each adapter's own rank."""
    names = ("lora_A", "lora_B")
    lora = read(pair(f"unet.{LAYER}.to_q", 2, width, names) | pair(f"unet.{LAYER}.to_k", 4, width, names))
    assert {adapter.rank: adapter.scale for adapter in lora.adapters.values()} == {2: 1, 4: 1}


def test_every_layer_may_have_an_alpha_of_its_own(read, width):
    """Source: huggingface/diffusers#3910."""
    alphas = {f"{KOHYA}_to_q.alpha": torch.tensor(94.0), f"{KOHYA}_to_k.alpha": torch.tensor(123.0).bfloat16()}
    lora = read(pair(f"{KOHYA}_to_q", 2, width) | pair(f"{KOHYA}_to_k", 4, width) | alphas)
    assert {adapter.rank: adapter.scale for adapter in lora.adapters.values()} == {2: 47, 4: 30.75}


def test_a_layer_that_is_not_there_is_an_error_and_not_left_out(read, width):
    """Source: bmaltais/kohya_ss#3000."""
    with pytest.raises(LoraFileError, match="layer that this network does not have"):
        read(pair(f"{KOHYA}_to_q", 2, width) | pair(f"{KOHYA.replace('0', '9')}_to_q", 2, width))


def test_broken_adapters_are_named(read, width):
    with pytest.raises(LoraFileError, match="is empty"):
        read(pair(f"{KOHYA}_to_q", 0, width))
    with pytest.raises(LoraFileError, match=r"the alpha of .* is \[1.0, 1.0\], which is no number"):
        read(pair(f"{KOHYA}_to_q", 2, width) | {f"{KOHYA}_to_q.alpha": torch.ones(2)})
