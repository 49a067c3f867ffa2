"""PixArt-alpha's network: the reference's numbers, the published files, and what files of others are told."""

import diffusers
import pytest
import torch

from families.common.library_networks import adapt
from families.common.weights import WeightsError
from families.dit import pixart_build
from families.dit.pixart_build import BLOCKS
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_files import find_denoiser
from families.dit.pixart_names import library_tensors, published_tensors
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.dit.pixart_versions import VERSIONS, numbers
from families.registry import family_of
from tests.families.dit.pixart import SMALL, golden_network
from tests.golden import load_manifest, resolve
from warpcore.meta import only_shapes

FILES = {"XL/2-256": "256x256", "XL/2-512": "512x512", "XL/2-1024-MS": "1024_ms"}


@pytest.mark.parametrize("case", ["pixart_small", "pixart_ms_small"])
@torch.no_grad()
def test_the_denoiser_predicts_what_the_reference_does(case):
    network, spec, tensors = golden_network(case)
    for call in spec["calls"]:
        (x, t, y), named = resolve(call["args"], tensors), resolve(call.get("kwargs", {}), tensors)
        given = {"encoder_hidden_states": y.squeeze(1)}
        if "mask" in named:
            given["encoder_attention_mask"] = named["mask"].bool()
        if "data_info" in named:
            given |= {"resolution": named["data_info"]["hw"], "aspect_ratio": named["data_info"]["ar"]}
        found, expected = network(x.squeeze(2), t, **given), resolve(call["result"], tensors).squeeze(2)
        torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("version", FILES)
def test_a_published_size_has_the_tensors_of_its_file(version):
    manifest = load_manifest(f"pixart_xl_2_{FILES[version]}", "opensora")
    with only_shapes():
        network = pixart_build.denoiser(PixartSettings(model_version=version))
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]
    side = network.pos_embed.base
    state = {"pos_embed": network.pos_embed.positions([side, side])} | published_tensors(network.state_dict())
    expected = {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("name", ["state_dict", None])
def test_a_published_file_says_which_network_it_holds(version, name, tmp_path):
    """Of one block instead of 28, as a file of 2.4 GB would be."""
    own = dict(VERSIONS[version].network) | {"num_layers": 1, "caption_channels": 8}
    with torch.device("meta"):
        network = PixArtTransformer2DModel(120, **own)
    network = network.to_empty(device="cpu")
    side = network.pos_embed.base
    state = {"pos_embed": network.pos_embed.positions([side, side])} | published_tensors(network.state_dict())
    file = tmp_path / "PixArt-XL-2-1024MS.pth"
    torch.save(state if name is None else {name: state}, file)
    assert family_of(file).name == "pixart"
    found = find_denoiser(file, "generator_checkpoint_path")
    assert dict(found.config) == own
    assert found.tensors().keys() == network.state_dict().keys()


def test_names_become_published_ones_and_back():
    network = PixArtTransformer2DModel(8, **SMALL | {"use_additional_conditions": True})
    state = network.state_dict()
    back = library_tensors(published_tensors(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"nothing.weight is no tensor"):
        published_tensors(state | {"nothing.weight": torch.ones(1)})


@torch.no_grad()
def test_any_size_has_the_positions_of_the_library():
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(**numbers(2, 12, 1, 16, sample_size=8, interpolation_scale=2))
    ours = PixArtTransformer2DModel(**numbers(2, 12, 1, 16, sample_size=8, interpolation_scale=2))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours = adapt(ours, BLOCKS)
    for size in ((8, 8), (12, 6)):
        x, t, text = torch.randn(2, 4, *size), torch.tensor([3, 500]), torch.randn(2, 5, 16)
        expected = theirs(x, text, t, {"resolution": None, "aspect_ratio": None}).sample
        torch.testing.assert_close(ours(x, t, encoder_hidden_states=text), expected, rtol=0, atol=1e-5)


def test_a_file_of_another_network_or_version_is_refused(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"state_dict": {"x_embedder.proj.weight": torch.ones(4, 4, 2, 2)}}, file)
    with pytest.raises(WeightsError, match=r"a.pth holds no PixArt-alpha: blocks.0.cross_attn.kv_linear.weight is"):
        pixart_build.denoiser(PixartSettings(generator_checkpoint_path=file))
    own = dict(VERSIONS["mini"].network)
    network = PixArtTransformer2DModel(16, **own)
    torch.save({"state_dict": published_tensors(network.state_dict())}, file)
    with pytest.raises(WeightsError, match=r"the empty text of .*a.pth has 16 tokens, and PixArt-mini reads 32"):
        pixart_build.denoiser(PixartSettings(generator_checkpoint_path=file, model_version="mini"))
    network = PixArtTransformer2DModel(32, **own | {"use_additional_conditions": True})
    torch.save({"state_dict": published_tensors(network.state_dict())}, file)
    with pytest.raises(WeightsError, match=r"is told the sizes of pictures, unlike PixArt-mini"):
        pixart_build.denoiser(PixartSettings(generator_checkpoint_path=file, model_version="mini"))


def test_a_pipeline_of_pixart_sigma_is_refused_though_its_denoiser_has_the_same_numbers(tmp_path):
    """Sources: PixArt-alpha/PixArt-sigma#70, Nerogar/OneTrainer#312."""
    small, key, index = (
        numbers(2, 12, 1, 16, sample_size=8),
        "generator_checkpoint_path",
        tmp_path / "model_index.json",
    )
    diffusers.PixArtTransformer2DModel(**small).save_pretrained(tmp_path / "transformer")
    index.write_text('{"_class_name": "PixArtAlphaPipeline"}', encoding="utf-8")
    assert find_denoiser(tmp_path, key).path == tmp_path / "transformer"
    index.write_text('{"_class_name": "PixArtSigmaPipeline"}', encoding="utf-8")
    for place in (tmp_path, tmp_path / "transformer"):
        with pytest.raises(WeightsError, match="is a PixArtSigmaPipeline, no PixArtAlphaPipeline"):
            find_denoiser(place, key)
