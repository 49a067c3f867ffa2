"""The published sizes without the memory for them: names, shapes and numbers of parameters."""

import re
from pathlib import Path

import pytest

from families.stable_diffusion import build
from families.stable_diffusion.config import SdSettings
from tests.golden import load_manifest
from warpcore.config import load_config
from warpcore.meta import only_shapes
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes, load_use_case

TEXT = {"sd15": ["clip_l_text"], "sdxl": ["clip_l_text", "clip_bigg_text"]}


def shapes_of(manifest: str) -> dict[str, tuple[int, ...]]:
    tensors = load_manifest(manifest, "sd_t5")["tensors"]
    return {name: tuple(shape) for name, shape in tensors.items()}


@pytest.mark.parametrize("version", TEXT)
def test_networks_have_the_tensors_of_the_published_files(version):
    settings = SdSettings(model_version=version)
    with only_shapes():
        networks = [build.unet(settings), build.autoencoder(settings).model]
        networks += [encoder.model for encoder in build.text_encoders(settings).encoders]
    manifests = [f"{version}_unet", "sd_vae" if version == "sd15" else "sdxl_vae", *TEXT[version]]
    for network, manifest in zip(networks, manifests, strict=True):
        expected = {name.removeprefix("text_model.") if manifest == "clip_l_text" else name: shape
                    for name, shape in shapes_of(manifest).items()}  # fmt: skip
        assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected
        assert all(tensor.is_meta for tensor in network.parameters())


def counted(script: str, config: str) -> list[Needs]:
    """The memory of an update of one sample on a GPU, without checkpointing and with all of it."""
    root = Path(__file__).parents[3]
    use_case = load_use_case(root / "train" / script)
    settings = load_config(use_case.Config, [str(root / "configs" / "training" / config)])
    with OnShapes(use_case, settings, "cuda") as shapes:
        size, kept = bucket_sizes(shapes.run)[0], []
        for level in (0, 3):
            shapes.set_checkpointing(level)
            kept.append(shapes.needs(size, 1))
    return kept


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    ("version", "config"),
    [
        ("sd15", "finetune_sd15.yaml"),
        ("sdxl", "finetune_sdxl.yaml"),
        ("sd15", "sd15_t5_sdxlvae.yaml"),
        ("sdxl", "sdxl_t5.yaml"),
    ],
)
def test_an_update_of_the_published_size_passes_on_shapes(version, config):
    kept = counted("train_sd.py", config)
    weights = 4 * load_manifest(f"{version}_unet", "sd_t5")["parameter_count"]
    for needs in kept:
        assert needs.weights == needs.gradients == weights
        assert needs.optimizer == pytest.approx(2 * weights, rel=1e-5)
    assert kept[1].activations < 0.6 * kept[0].activations


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("version", TEXT)
def test_an_update_of_a_lora_on_the_published_networks_passes_on_shapes(version):
    """Adapters of rank 8 on attention of the U-Net and on all layers of text encoders, and a token in each."""
    sizes = [shapes_of(f"{version}_unet")] + [shapes_of(manifest) for manifest in TEXT[version]]
    layers = r".*\.(to_[qkv]|to_out\.0|self_attn\.\w+_proj|fc[12])\.weight"
    adapters = sum(8 * sum(shape) for own in sizes for name, shape in own.items() if re.fullmatch(layers, name))
    tokens = {"sd15": 768, "sdxl": 768 + 1280}[version]
    first, last = counted("train_sd_lora.py", f"finetune_{version}_lora.yaml")
    for needs in (first, last):
        assert needs.weights == needs.gradients == 4 * (adapters + tokens)
        assert needs.optimizer == pytest.approx(2 * needs.weights, rel=1e-3)
    assert last.activations < first.activations
