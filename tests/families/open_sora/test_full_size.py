"""The published sizes without the memory for them: names and shapes, and updates on shapes."""

from pathlib import Path

import pytest
import torch

from families.common.weights import only_shapes
from families.open_sora import build
from families.open_sora.autoencoder import autoencoder
from families.open_sora.config import OpenSoraSettings
from families.open_sora.lora_config import OpenSoraLoraConfig
from tests.golden import load_manifest
from warpcore.config import load_config
from warpcore.data.resolutions import named_size
from warpcore.rehearsal import OnShapes, bucket_sizes, load_use_case

ROOT = Path(__file__).parents[3]
PARAMETERS = {"XL/2": 1_207_643_936, "3B/2": 3_182_211_536}
"""Those that are trained: without the 36 numbers of `rope.freqs`."""


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("version", "manifest"), [("XL/2", "opensora_stdit3_xl"), ("3B/2", "opensora_stdit3_3b")])
def test_the_network_has_the_tensors_of_the_published_file(version, manifest):
    with only_shapes():
        network = build.network(OpenSoraSettings(model_version=version))
    expected = load_manifest(manifest, "opensora")["tensors"]
    assert shapes(network) == {name: tuple(one["shape"]) for name, one in expected.items()}


def test_the_lora_learns_clips_as_wide_as_those_that_are_drawn():
    config = load_config(OpenSoraLoraConfig, [str(ROOT / "configs" / "training" / "stdit3_xl2_lora.yaml")])
    height, width = named_size("240p", "9:16")
    assert config.buckets(8).sizes == [(51, height // 8 * 8, width // 8 * 8)]


@pytest.mark.integration
def test_the_autoencoder_has_the_tensors_of_the_published_file():
    with only_shapes():
        made = autoencoder(OpenSoraSettings())
    expected = load_manifest("opensora_vae_v1_2", "opensora")["tensors"]
    assert shapes(made.model) == {name: tuple(one["shape"]) for name, one in expected.items()}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("config", ["stdit3_xl2.yaml", "stdit3_3b2.yaml"])
def test_an_update_of_the_published_size_passes_on_shapes(config):
    use_case = load_use_case(ROOT / "train" / "train_stdit.py")
    settings = load_config(use_case.Config, [str(ROOT / "configs" / "training" / config)])
    kept = []
    with only_shapes(), OnShapes(use_case, settings, "cuda") as on_shapes:
        for level in (0, 3):
            on_shapes.set_checkpointing(level)
            kept.append(on_shapes.needs(bucket_sizes(on_shapes.run)[0], 1))
    for needs in kept:
        assert needs.weights == pytest.approx(4 * PARAMETERS[settings.model_version], rel=1e-2)
        assert needs.gradients == 4 * PARAMETERS[settings.model_version]
    assert kept[1].activations < 0.5 * kept[0].activations
