"""The small networks of the reference: whole, part by part, and the autoencoder."""

import pytest
import torch
from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed

from families.common.wan_autoencoder import WanAutoencoder
from tests.families.cosmos.small import TEXT, golden_network
from tests.golden import load_case, load_manifest, resolve, weights_of

CASES = ("dit_small", "dit_other_ratios", "dit_without_padding_mask")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_denoiser_predicts_what_the_reference_does(case):
    network, spec, tensors = golden_network(case)
    for call in spec["calls"]:
        given = resolve(call["kwargs"], tensors)
        latents, times, text = given["x_B_C_T_H_W"], given["timesteps_B_T"].flatten(), given["crossattn_emb"]
        masks = given.get("padding_mask")
        expected, atol = resolve(call["result"], tensors), call["result_stats"]["suggested_atol"]
        for row in range(len(latents)):
            one = slice(row, row + 1)
            mask = {} if masks is None else {"padding_mask": masks[one]}
            found = network(latents[one], times[one], **{TEXT: text[one]}, **mask)
            torch.testing.assert_close(found, expected[one], rtol=0, atol=atol)


@torch.no_grad()
def test_pictures_need_no_frames_and_no_mask_and_share_a_batch():
    network, spec, tensors = golden_network("dit_small")
    call = next(call for call in spec["calls"] if call["name"] == "tall_batch")
    given = resolve(call["kwargs"], tensors)
    assert not given["padding_mask"].any()
    times = given["timesteps_B_T"].flatten()
    found = network(given["x_B_C_T_H_W"][:, :, 0], times, **{TEXT: given["crossattn_emb"]})
    torch.testing.assert_close(found, resolve(call["result"], tensors)[:, :, 0], rtol=0, atol=1e-4)


PARTS = {
    "patchify": lambda net, x: net.patch_embed,
    "timestep_sines": lambda net, t: net.time_embed.time_proj(t.flatten())[:, None],
    "timestep_embedding": lambda net, e: net.time_embed.norm(e),
}


@torch.no_grad()
def test_parts_of_the_denoiser_compute_what_those_of_the_reference_do():
    network, spec, tensors = golden_network("dit_parts")
    calls = {call["name"]: call for call in spec["calls"]}
    block, angles = network.transformer_blocks[0], tensors["in.block.rope"]
    rotary = angles.flatten(0, 2).cos(), angles.flatten(0, 2).sin()
    embedding, modulation = (tensors[f"in.block.{name}"][:, 0] for name in ("embedding", "modulation"))
    tokens, text = tensors["in.block.x"].flatten(1, 3), tensors["in.block.text"]
    times = tensors["in.t"].flatten()
    made, embedded = network.time_embed(tokens, times)
    attended = tensors["in.self_attention.x"]
    final = network.proj_out(network.norm_out(tokens, embedding, modulation))
    found = {
        "timestep_sines": network.time_embed.time_proj(times)[:, None],
        "timestep_modulation": made[:, None],
        "timestep_embedding": embedded[:, None],
        "block": block(tokens, text, embedding, modulation, rotary, None, None, None).view_as(tensors["in.block.x"]),
        "self_attention": block.attn1(attended, image_rotary_emb=rotary),
        "cross_attention": block.attn2(attended, encoder_hidden_states=text),
        "final_layer": final.view_as(tensors["out.final_layer"]),
    }
    for name, value in found.items():
        expected = tensors[f"out.{name}"]
        torch.testing.assert_close(value, expected, rtol=0, atol=calls[name]["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("case", ["rope_head32_1x3x5", "rope_head64_2x4x3", "rope_head128_1x6x4"])
def test_rotary_angles_are_those_of_the_reference_in_float32(case):
    spec, tensors = load_case("cosmos/dit_parts")
    call = next(call for call in spec["calls"] if call["name"] == case)
    numbers, (_, frames, rows, columns, _) = call["object"]["kwargs"], call["args"][0]
    ratios = [numbers[f"{axis}_extrapolation_ratio"] for axis in "thw"]
    rope = CosmosRotaryPosEmbed(numbers["head_dim"], (128, 240, 240), (1, 2, 2), rope_scale=ratios)
    cosines, sines = rope(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    angles = tensors[f"out.{case}"].flatten(0, 2)
    torch.testing.assert_close(cosines, angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sines, angles.sin(), rtol=0, atol=1e-6)


def wan(spec: dict, tensors: dict) -> WanAutoencoder:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    ours = WanAutoencoder(spec["same_in_diffusers"]["constructor"])
    ours.model.load_state_dict(convert_wan_vae_to_diffusers(weights_of(spec, tensors)), strict=True)
    return ours


@torch.no_grad()
def test_the_autoencoder_gives_the_latents_and_pictures_of_the_reference():
    spec, tensors = load_case("cosmos/vae_small")
    ours = wan(spec, tensors)
    assert (ours.scale.mean, ours.scale.std) == (tuple(spec["latents_mean"]), tuple(spec["latents_std"]))
    assert (ours.compression, ours.latent_channels) == (8, 16)
    latents = tensors["out.picture.latents"][:, :, 0]
    moments = ours._encode(tensors["in.picture"][:, :, 0])  # its pictures are not of whole grey levels
    torch.testing.assert_close(ours.scale.latents(moments, None), latents, rtol=0, atol=2e-5)
    expected = (tensors["out.picture.pictures"][:, :, 0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_five_frames_are_two_latent_frames():
    spec, tensors = load_case("cosmos/vae_small")
    ours = wan(spec, tensors)
    mean, std = (torch.tensor(spec[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    found = (ours.model.encode(tensors["in.five_frames"]).latent_dist.mean - mean) / std
    torch.testing.assert_close(found, tensors["out.five_frames.latents"], rtol=0, atol=3e-5)
    made = ours.model.decode(tensors["out.five_frames.latents"] * std + mean).sample
    torch.testing.assert_close(made, tensors["out.five_frames.pictures"].clamp(-1, 1), rtol=0, atol=4e-4)


def test_published_names_of_the_autoencoder_become_those_of_diffusers():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = load_manifest("wan_vae", "cosmos")["names_in_diffusers"]
    found = convert_wan_vae_to_diffusers({name: name for name in names})
    assert {original: library for library, original in found.items()} == names
