"""Names of all tensors of the published networks, in single files and in diffusers' and transformers' folders."""

import pytest
import torch

from families.common.original_unet import library_unet_name, original_unet_name
from families.stable_diffusion.original_names import library_tensors, original_tensors
from tests.golden import load_manifest

COMPONENTS = {
    "sd15_unet": "unet", "sdxl_unet": "unet", "sd_vae": "vae", "sdxl_vae": "vae", "clip_l_text": "text_encoder",
    "clip_bigg_text": "text_encoder_2",
}  # fmt: skip


def published(manifest: str) -> dict[str, torch.Tensor]:
    """Tensors of a full-size network without memory, in the library's own names."""
    shapes = load_manifest(manifest, "sd_t5")["tensors"]
    bare = COMPONENTS[manifest] == "text_encoder"  # transformers 5 dropped the prefix
    return {
        name.removeprefix("text_model.") if bare else name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("manifest", ["sd15_unet", "sdxl_unet", "sd_vae", "sdxl_vae"])
def test_the_published_networks_get_the_names_and_shapes_of_single_files(manifest):
    spec = load_manifest(manifest, "sd_t5")
    own, original = published(manifest), spec["original"]
    made = original_tensors(COMPONENTS[manifest], own).items()
    found = {
        name: (original["prefix"] + in_file, list(tensor.shape))
        for name, (in_file, tensor) in zip(own, made, strict=True)
    }
    differs = original["original_shape_differs"]
    assert found == {
        name: (in_file, differs.get(name, spec["tensors"][name]))
        for name, in_file in original["diffusers_to_original"].items()
    }


@pytest.mark.parametrize("manifest", COMPONENTS)
def test_names_and_shapes_of_the_published_networks_return_from_single_files(manifest):
    own, component = published(manifest), COMPONENTS[manifest]
    in_file = original_tensors(component, own)
    assert shapes(dict(library_tensors(component, in_file, in_file.__getitem__))) == shapes(own)
    if component in ("unet", "vae"):  # each has one of its own
        back = (name for name, _ in library_tensors(component, in_file, in_file.__getitem__))
        assert dict(zip(in_file, back, strict=True)) == dict(zip(in_file, own, strict=True))


def test_open_clip_s_names_are_those_of_its_own_network():
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(
            embed_dim=20, vision_cfg={"layers": 1, "width": 64, "head_width": 64, "image_size": 32, "patch_size": 16},
            text_cfg={"context_length": 77, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3},
        )  # fmt: skip
    names = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    own = dict(library_tensors("text_encoder_2", names, names.__getitem__))
    assert own["text_projection.weight"].shape == (20, 24)
    assert len(own) == 4 + 3 * 16 + 1
    assert shapes(original_tensors("text_encoder_2", own)) == {
        name: shape for name, shape in shapes(names).items() if name not in ("logit_scale", "attn_mask")
    }


@pytest.mark.parametrize("name", ["blocks.0.attn", "down_blocks.0.unknown.0.weight"])
def test_names_of_no_layer_are_errors(name):
    with pytest.raises(ValueError, match="no layer of Stable Diffusion's U-Net"):
        original_unet_name(name, 2)
    with pytest.raises(ValueError, match="no layer of Stable Diffusion's U-Net"):
        library_unet_name(name, 2)
    with pytest.raises(ValueError, match="no tensor of open_clip's text encoder"):
        dict(library_tensors("text_encoder_2", [name], lambda name: torch.zeros(1)))
