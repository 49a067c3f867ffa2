"""Published names of tensors and diffusers' ones, both ways, and the published sizes."""

from pathlib import Path

import pytest
import torch

from families.common.t5 import EMBEDDING_ALIAS, StandInTokenizer, T5TextEncoder
from families.cosmos import original_names
from families.cosmos.transformer import CosmosTransformer3DModel
from families.cosmos.versions import T5_11B, VERSIONS, version_of
from tests.golden import load_case, load_manifest
from warpcore.meta import only_shapes

SIZES = ("0.6B", "2B", "14B")


@pytest.mark.parametrize("size", SIZES)
def test_the_full_size_network_has_the_tensors_of_the_published_file(size):
    manifest, version = load_manifest(f"dit_{size}", "cosmos"), VERSIONS[size]
    assert dict(version.transformer) == manifest["same_in_diffusers"]["constructor"]
    assert version_of(version.transformer) == size
    with torch.device("meta"):
        network = CosmosTransformer3DModel(**version.transformer)
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]
    published = original_names.published_tensors(network.state_dict(), version.transformer["attention_head_dim"])
    expected = {name: tuple(about["shape"]) for name, about in manifest["tensors"].items()}
    assert {f"net.{name}": tuple(tensor.shape) for name, tensor in published.items()} == expected
    back = original_names.library_tensors(published)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


def test_the_full_size_text_encoder_has_the_tensors_of_the_published_file():
    manifest = load_manifest("t5_11b_encoder", "cosmos")
    assert manifest["constructor"].items() <= T5_11B.items()
    with only_shapes():
        model = T5TextEncoder.of(T5_11B, StandInTokenizer(), dict, Path("t5-11b"), precision="bfloat16").model
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["parameter_count"]
    expected = {name: tuple(about["shape"]) for name, about in manifest["tensors"].items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - expected.keys() <= {EMBEDDING_ALIAS}


def test_names_are_mapped_by_the_published_rules():
    spec, _ = load_case("cosmos/key_mapping")
    for published, library in spec["examples"].items():
        bare = original_names.bare(published)
        assert original_names.is_published(published)
        assert original_names.library_tensors({bare: torch.zeros(1)}).keys() == {library}
        assert original_names.published_layer(library.rpartition(".")[0]) == bare.rpartition(".")[0]
    dropped = {
        name: torch.zeros(1) for name in [*spec["dropped_if_contained"][:-1], "blocks.0.self_attn._extra_state"]
    }
    assert original_names.library_tensors(dropped) == {}


def test_buffers_of_published_files_have_the_values_of_the_reference():
    spec, tensors = load_case("cosmos/dit_small")
    own = {name.removeprefix("weights."): tensor for name, tensor in tensors.items() if name.startswith("weights.")}
    found = original_names.buffers(spec["same_in_diffusers"]["constructor"]["attention_head_dim"])
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def test_a_tensor_of_another_network_has_no_published_name():
    with pytest.raises(ValueError, match="mid_block"):
        original_names.published_tensors({"mid_block.weight": torch.zeros(1)}, 64)
