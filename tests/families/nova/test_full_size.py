"""The published sizes without the memory for them: the networks of the configs, and updates on shapes."""

from pathlib import Path

import pytest

from families.nova import build
from tests.golden import load_manifest
from train.train_nova import TrainNova
from warpcore.config import load_config
from warpcore.meta import only_shapes
from warpcore.parameter_groups import group_of
from warpcore.rehearsal import OnShapes, bucket_sizes, load_use_case

ROOT = Path(__file__).parents[3]
CONFIGS = {
    "nova_0.3b": "nova_d48w768_sdxl1024", "nova_0.6b": "nova_d48w1024_sdxl1024", "nova_1.4b": "nova_d48w1536_sdxl1024",
    "nova_0.6b_512": "nova_d48w1024_sd512", "nova_0.6b_video": "nova_d48w1024_osp480",
    "nova_0.6b_video video_mixer_rank=24": "nova_d48w1024_osp480_mixer24",
}  # fmt: skip


def config_of(words: str):
    name, *further = words.split()
    return load_config(TrainNova.Config, [str(ROOT / "configs" / "training" / f"{name}.yaml"), *further])


@pytest.mark.parametrize("words", CONFIGS)
def test_the_network_of_a_config_is_the_published_one(words):
    config, manifest = config_of(words), load_manifest(CONFIGS[words], "nova")
    with only_shapes():
        use_case = TrainNova(config)
        network = build.network(config, use_case.size_px)
        numbers = build.network_numbers(config, use_case.size_px)
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]
    for name in ("image_base_size", "video_base_size"):
        assert list(numbers[name]) == list(manifest["constructor"][name])


@pytest.mark.parametrize("words", ["nova_0.3b", "nova_0.6b_video"])
def test_norms_alone_do_not_decay(words):
    config = config_of(words)
    with only_shapes():
        network = build.network(config)
    norms = {
        f"generator.{name}.{own}"
        for name, module in network.named_modules()
        if type(module).__name__ == "LayerNorm"
        for own, _ in module.named_parameters()
    }
    names = [f"generator.{name}" for name, _ in network.named_parameters()]
    for name, group in group_of(names, config.parameter_groups).items():
        assert group.frozen or group.weight_decay == (0 if name in norms else 0.02), name


@pytest.mark.slow
@pytest.mark.integration
def test_an_update_of_the_published_size_passes_on_shapes_and_keeps_less_at_each_level():
    use_case = load_use_case(ROOT / "train" / "train_nova.py")
    config, kept = config_of("nova_0.3b"), []
    with OnShapes(use_case, config, "cuda") as on_shapes:
        for level in range(4):
            on_shapes.set_checkpointing(level)
            kept.append(on_shapes.needs(bucket_sizes(on_shapes.run)[0], 1))
    for needs in kept:
        assert needs.weights == pytest.approx(4 * 363_946_000, rel=2e-2)
    activations = [needs.activations for needs in kept]
    assert activations == sorted(activations, reverse=True)
    assert activations[3] < 0.7 * activations[0]
