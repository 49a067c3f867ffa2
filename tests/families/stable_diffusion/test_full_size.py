"""The published sizes without the memory for them: names, shapes and numbers of parameters."""

from pathlib import Path

import pytest

from families.common.weights import only_shapes
from families.stable_diffusion import build
from families.stable_diffusion.config import SdSettings
from tests.golden import load_manifest
from warpcore.config import load_config
from warpcore.rehearsal import OnShapes, bucket_sizes, load_use_case

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


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("version", TEXT)
def test_an_update_of_the_published_size_passes_on_shapes(version):
    root = Path(__file__).parents[3]
    use_case = load_use_case(root / "train" / "train_sd.py")
    config = load_config(use_case.Config, [str(root / "configs" / "training" / f"finetune_{version}.yaml")])
    with only_shapes(), OnShapes(use_case, config, "cuda") as shapes:
        size = bucket_sizes(shapes.run)[0]
        kept = []
        for level in (0, 3):
            shapes.set_checkpointing(level)
            kept.append(shapes.needs(size, 1))
    weights = 4 * load_manifest(f"{version}_unet", "sd_t5")["parameter_count"]
    for needs in kept:
        assert needs.weights == needs.gradients == weights
        assert needs.optimizer == pytest.approx(2 * weights, rel=1e-5)
    assert kept[1].activations < 0.6 * kept[0].activations
