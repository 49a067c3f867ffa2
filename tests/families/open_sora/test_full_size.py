"""The published sizes without the memory for them: names and shapes, and updates on shapes."""

from pathlib import Path

import pytest
import torch

from families.open_sora import build
from families.open_sora.autoencoder import autoencoder
from families.open_sora.config import OpenSoraConfig, OpenSoraSettings
from tests.golden import load_manifest
from train.train_stdit import TrainStdit
from train.train_stdit_lora import TrainStditLora
from warpcore.config import load_config
from warpcore.core import WarpCore
from warpcore.data.resolutions import named_size
from warpcore.meta import only_shapes
from warpcore.rehearsal import OnShapes, bucket_sizes

ROOT = Path(__file__).parents[3]
PARAMETERS = {
    "XL/2": 1_207_643_936, "3B/2": 3_182_211_536, "STDiT2-XL/2": 767_452_064, "STDiT-XL/2": 759_620_768,
}  # fmt: skip
"""Those that are trained: without the 36 numbers of `rope.freqs`, and without tables of positions."""


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def published(manifest: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one["shape"]) for name, one in load_manifest(manifest, "opensora")["tensors"].items()}


def config_of(name: str, use_case: type[WarpCore] = TrainStdit) -> OpenSoraConfig:
    return load_config(use_case.Config, [str(ROOT / "configs" / "training" / name)])


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        ("stdit3_xl2.yaml", "opensora_stdit3_xl"), ("stdit3_3b2.yaml", "opensora_stdit3_3b"),
        ("stdit2_xl2.yaml", "opensora_stdit2_xl"), ("stdit_16x256x256.yaml", "opensora_stdit1_xl_16x256x256"),
    ],
)  # fmt: skip
def test_the_network_has_the_tensors_of_the_published_file(config, manifest):
    settings = config_of(config)
    with only_shapes():
        network = build.network(settings)
    assert shapes(network) == published(manifest)
    assert sum(one.numel() for one in network.parameters()) == PARAMETERS[settings.model_version]


def test_clips_of_another_size_have_the_positions_of_their_published_file():
    """The tables follow from the clip, and are no part of what is read."""
    settings = config_of("stdit_64x512x512.yaml")
    with only_shapes():
        network = build.network(settings)
    expected = published("opensora_stdit1_xl_64x512x512")
    places, frames = network.positions((settings.num_frames, *(side // 16 for side in (settings.image_size,) * 2)))
    own = {"pos_embed": tuple(places.shape), "pos_embed_temporal": tuple(frames.shape)}
    assert shapes(network) | own == expected


def test_the_lora_learns_clips_as_wide_as_those_that_are_drawn():
    config = config_of("stdit3_xl2_lora.yaml", TrainStditLora)
    height, width = named_size("240p", "9:16")
    assert config.buckets(8).sizes == [(51, height // 8 * 8, width // 8 * 8)]


@pytest.mark.integration
def test_the_autoencoder_has_the_tensors_of_the_published_file():
    with only_shapes():
        made = autoencoder(OpenSoraSettings())
    assert shapes(made.model) == published("opensora_vae_v1_2")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    "config",
    [
        "stdit3_xl2.yaml",
        "stdit3_3b2.yaml",
        "stdit2_xl2.yaml",
        "stdit_64x512x512.yaml",
    ],
)
def test_an_update_of_the_published_size_passes_on_shapes(config):
    settings, kept = config_of(config), []
    with OnShapes(TrainStdit, settings, "cuda") as on_shapes:
        for level in (0, 3):
            on_shapes.set_checkpointing(level)
            kept.append(on_shapes.needs(bucket_sizes(on_shapes.run)[0], 1))
    for needs in kept:
        assert needs.weights == pytest.approx(4 * PARAMETERS[settings.model_version], rel=1e-2)
        assert needs.gradients == 4 * PARAMETERS[settings.model_version]
    assert kept[1].activations < 0.5 * kept[0].activations
