"""The autoencoder of NOVA's clips gives what the reference does, and its state is that of the published file."""

import re

import pytest
import torch
from torch import Tensor

from modules.open_sora_plan_vae import OpenSoraPlanAutoencoder, from_open_sora_plan, is_open_sora_plan
from tests.golden import load_case, load_manifest, resolve, weights_of

SPEC, TENSORS = load_case("nova/vae_opensora_small")
CALLS = {call["name"]: call for call in SPEC["calls"]}
LOSSY = {"encode_20x16x16", "decode_7x1x2"}
"""The reference drops frames there."""


@pytest.fixture(scope="module")
def network() -> OpenSoraPlanAutoencoder:
    network = OpenSoraPlanAutoencoder(**SPEC["constructor"])
    network.load_state_dict(weights_of(SPEC, TENSORS))
    return network


def agrees(found: Tensor, name: str) -> None:
    call = CALLS[name]
    expected = resolve(call["result"], TENSORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


def given(name: str) -> Tensor:
    return resolve(CALLS[name]["args"], TENSORS)[0]


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("encode") and name not in LOSSY])
@torch.no_grad()
def test_moments_are_those_of_the_reference(network, name):
    agrees(network.encode(given(name)), name)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("decode") and name not in LOSSY])
@torch.no_grad()
def test_clips_are_those_of_the_reference(network, name):
    agrees(network.decode(given(name)), name)


@torch.no_grad()
def test_no_frame_of_an_incomplete_tile_is_lost(network):
    clip = given("encode_20x16x16")
    with pytest.raises(ValueError, match="20 frames: write one more than a multiple of 4, such as 17 or 21"):
        network.encode(clip)
    longer = torch.cat([clip, clip[:, :, -1:]], dim=2)
    moments = network.encode(longer)
    assert moments.shape[2] == network.latent_frames(21) == 6
    agrees(moments[:, :, :5], "encode_20x16x16")
    torch.testing.assert_close(moments[:, :, 5:], network.encode(longer[:, :, 16:])[:, :, 1:])
    latents = given("decode_7x1x2")
    frames = network.decode(latents)
    assert frames.shape[2] == 25
    agrees(frames[:, :, :17], "decode_7x1x2")
    torch.testing.assert_close(frames[:, :, 17:], network.decode(latents[:, :, 4:])[:, :, 1:])


@torch.no_grad()
def test_latents_are_scaled_as_the_reference_does(network):
    agrees(network.scaled(given("scale")), "scale")
    agrees(network.unscaled(given("unscale")), "unscale")


def test_the_published_network_has_the_tensors_of_its_file():
    manifest = load_manifest("vae_opensora", "nova")
    with torch.device("meta"):
        network = OpenSoraPlanAutoencoder(**manifest["constructor"])
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]


BACK = (
    (r"\.up_blocks\.(\d)", lambda match: f".up.{3 - int(match[1])}"),
    (r"\.down_blocks\.", ".down."),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.resnets\.", ".block."),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    (r"\.to_([qkv])", r".\1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (r"samplers\.0", "sample"),
)


def test_files_of_open_sora_plan_are_read(network):
    def renamed(name: str) -> str:
        for pattern, replacement in BACK:
            name = re.sub(pattern, replacement, name)
        return name

    state = network.state_dict()
    in_clips = {name.rpartition(".")[0] for name, tensor in state.items() if tensor.dim() == 5 or ".to_" in name}

    def old(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        layer, _, kind = name.rpartition(".")
        tensor = tensor[:, :, None, None, None] if ".to_" in name and kind == "weight" else tensor
        return renamed(f"{layer}.conv.{kind}" if layer in in_clips else name), tensor

    theirs = dict(old(*each) for each in state.items())
    assert "decoder.up.3.upsample.conv.conv.weight" in theirs
    assert "encoder.down.0.downsample.conv.bias" in theirs
    assert "encoder.mid.attn_1.q.conv.weight" in theirs
    assert is_open_sora_plan(theirs)
    assert not is_open_sora_plan(state)
    found = from_open_sora_plan(theirs)
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name])


def test_checkpointing_changes_no_gradient(network):
    def gradients() -> list[Tensor]:
        moments = network.encode(given("encode_5x16x24"))
        loss = moments.square().sum() + network.decode(moments[:, :4]).square().sum()
        return torch.autograd.grad(loss, list(network.parameters()))

    plain = gradients()
    network.set_activation_checkpointing(3)
    assert all(block.checkpointed for block in network.blocks)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    network.set_activation_checkpointing(0)


def test_what_does_not_fit_is_refused(network):
    with pytest.raises(ValueError, match="down_block_types: "):
        OpenSoraPlanAutoencoder(down_block_types=["DownEncoderBlock2D"] * 4)
    with pytest.raises(ValueError, match="20 x 16: sides are multiples of 8"):
        network.encode(torch.zeros(1, 3, 1, 20, 16))
