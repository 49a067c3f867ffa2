"""The autoencoder against diffusers' own: moments, latents drawn with recorded noise, pictures, files."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common.autoencoders import Autoencoder, LatentScale
from warpcore.errors import UserError
from warpcore.meta import only_shapes
from warpcore.random import SampleRandom
from warpcore.weights import write_weights

SMALL = {
    "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 4, "sample_size": 32, "latent_channels": 4,
}  # fmt: skip
PICTURES = torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def theirs(**config) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(**SMALL | config).eval()


@pytest.fixture
def folder(tmp_path):
    theirs(scaling_factor=0.13025, shift_factor=0.1).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@torch.no_grad()
def test_moments_latents_and_pictures_are_those_of_diffusers(folder):
    ours, library = Autoencoder.load(folder), diffusers.AutoencoderKL.from_pretrained(folder).eval()
    posterior = library.encode(PICTURES.float() / 127.5 - 1).latent_dist
    moments = ours.moments(PICTURES)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert moments.shape == (3, 2 * ours.latent_channels, 40 // ours.compression, 32 // ours.compression)

    random = SampleRandom([7, 8, 9])
    noise = random.normal("latent", *posterior.mean.shape[1:])
    drawn = (posterior.mean + posterior.std * noise - 0.1) * 0.13025
    torch.testing.assert_close(ours.scale.latents(moments, random), drawn)
    torch.testing.assert_close(ours.scale.latents(moments, None), (posterior.mode() - 0.1) * 0.13025)
    other_draw = ours.scale.latents(moments[1:], SampleRandom([8, 10]))
    torch.testing.assert_close(other_draw[0], drawn[1])  # a sample's latent follows from its own seed alone
    assert not torch.allclose(other_draw[1], drawn[2])

    pixels = library.decode(drawn / 0.13025 + 0.1).sample
    torch.testing.assert_close(ours.decode(drawn), (pixels / 2 + 0.5).clamp(0, 1))


def test_channels_with_their_own_mean_and_std_are_scaled_as_pipelines_do():
    mean, std = [-1.6, 0.1, 0.5, 2.0], [8.4, 5.4, 6.2, 4.1]
    scale = LatentScale.of({"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5})
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    column = torch.tensor([mean, std]).view(2, 1, 4, 1, 1)
    torch.testing.assert_close(scale.apply(latents), (latents - column[0]) * 0.5 / column[1])
    torch.testing.assert_close(scale.undo(scale.apply(latents)), latents)


@torch.no_grad()
def test_it_keeps_its_precision_in_a_run_of_bfloat16(folder):
    plain, moved = Autoencoder.load(folder), Autoencoder.load(folder).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        moments = moved.moments(PICTURES)
        pictures = moved.decode(moved.scale.latents(moments, None))
    expected = plain.moments(PICTURES)
    torch.testing.assert_close(moments, expected, rtol=0, atol=0)
    torch.testing.assert_close(pictures, plain.decode(plain.scale.latents(expected, None)), rtol=0, atol=0)
    low = Autoencoder.load(folder, precision="bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in low.parameters())
    assert 0 < (low.moments(PICTURES) - expected).abs().max() < 0.1


@torch.no_grad()
def test_large_pictures_are_decoded_in_tiles_and_slices_as_in_diffusers(folder):
    library = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    library.enable_tiling()
    tiled, plain = Autoencoder.load(folder, tiling=True), Autoencoder.load(folder)
    latents = torch.randn(2, 4, 20, 12, generator=torch.Generator().manual_seed(3)) * 0.1
    expected = (library.decode(latents / 0.13025 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiled.decode(latents), expected)
    assert not torch.allclose(plain.decode(latents), expected)
    large = torch.cat([PICTURES, PICTURES], dim=-1)
    torch.testing.assert_close(tiled.moments(large), plain.moments(large), rtol=0, atol=0)  # encoding stays whole
    sliced = Autoencoder.load(folder, slicing=True)
    torch.testing.assert_close(sliced.decode(latents), plain.decode(latents))


def test_files_are_read_strictly_and_written_in_diffusers_names(folder, tmp_path):
    ours, file = Autoencoder.load(folder), tmp_path / "vae.safetensors"
    write_weights(file, ours.weights_to_save(), ours.metadata_to_save())
    library = theirs()
    library.load_state_dict(load_file(file), strict=True)
    again = Autoencoder.load(file)
    assert again.scale == ours.scale
    assert torch.equal(again.moments(PICTURES), ours.moments(PICTURES))
    in_pipeline = Autoencoder.load(folder.parent)
    assert torch.equal(in_pipeline.moments(PICTURES), ours.moments(PICTURES))

    before_2023 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(file)
    for now, then in before_2023.items():
        old = {name.replace(f".{now}.", f".{then}."): tensor for name, tensor in old.items()}
    save_file(old, tmp_path / "old.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert torch.equal(Autoencoder.load(tmp_path / "old.safetensors", config).moments(PICTURES),
                       ours.moments(PICTURES))  # fmt: skip


def test_what_does_not_fit_is_one_clear_error(folder, tmp_path):
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "quant_conv.bias"}, tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "bare.safetensors").read_bytes()[:1000])
    config = json.loads((folder / "config.json").read_text())
    for error, load in (
        ("vae_path: .* does not exist", lambda: Autoencoder.load(tmp_path / "none", key="vae_path")),
        ("does not say which autoencoder", lambda: Autoencoder.load(tmp_path / "bare.safetensors")),
        ("quant_conv.bias is missing in the file", lambda: Autoencoder.load(tmp_path / "less.safetensors", config)),
        ("cannot be read as safetensors", lambda: Autoencoder.load(tmp_path / "cut.safetensors", config)),
        (r"\(8, 3, 3, 3\) in the file, \(12, 3, 3, 3\) in the network", lambda: Autoencoder.load(
            tmp_path / "bare.safetensors", config | {"block_out_channels": [12, 16, 16]})),
        ("its config is none of AutoencoderKL", lambda: Autoencoder.load(tmp_path / "bare.safetensors", {"dim": 3})),
        ("its config is none of AutoencoderKL", lambda: Autoencoder.load(folder, config | {"layers_per_block": "2"})),
        ("scaling_factor .* is None; write a number", lambda: Autoencoder.load(folder, {"scaling_factor": None})),
        ("scaling_factor .* is 0; write a number", lambda: LatentScale.of({"scaling_factor": 0})),
        ("overflows in float16", lambda: Autoencoder.load(folder, precision="float16")),
        ("picture of 34 x 40 px; sides .* multiples of 4",
         lambda: Autoencoder.load(folder).moments(torch.zeros(1, 3, 40, 34, dtype=torch.uint8))),
    ):  # fmt: skip
        with pytest.raises(UserError, match=error):
            load()
    assert Autoencoder.load(folder, config | {"force_upcast": False}, precision="float16").precision == "float16"


def test_only_shapes_reads_no_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with only_shapes():
        network = Autoencoder.load(folder)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
