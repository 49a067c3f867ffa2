"""The published sizes without the memory for them: the autoencoder's tensors, and updates on shapes."""

from pathlib import Path

import pytest

from families.common.wan_autoencoder import WanAutoencoder
from families.cosmos import build
from families.cosmos.config import CosmosSettings
from tests.golden import load_manifest
from tools.cache_features import as_if_cached
from warpcore.config import load_config
from warpcore.meta import only_shapes
from warpcore.planning import GIB, USABLE
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes, load_use_case

ROOT = Path(__file__).parents[3]


def test_the_autoencoder_has_the_tensors_of_the_published_file():
    manifest = load_manifest("wan_vae", "cosmos")
    with only_shapes():
        autoencoder = build.autoencoder(CosmosSettings())
    assert isinstance(autoencoder, WanAutoencoder)
    found = {name: tuple(tensor.shape) for name, tensor in autoencoder.model.state_dict().items()}
    names = manifest["names_in_diffusers"]
    assert found == {names[name]: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert all(tensor.is_meta for tensor in autoencoder.parameters())


def counted(
    script: str, config: str, *keys: str, levels: tuple[int, ...] = (0, 3), processes: int = 1, cached: bool = False
) -> list[Needs]:
    """The memory of an update of one sample on a GPU, by default without checkpointing and with all of it."""
    use_case = load_use_case(ROOT / "train" / script)
    settings = load_config(use_case.Config, [str(ROOT / "configs" / "training" / config), *keys])
    use_case = as_if_cached(use_case, settings) if cached else use_case
    with OnShapes(use_case, settings, "cuda", processes) as shapes:
        size, kept = bucket_sizes(shapes.run)[0], []
        for level in levels:
            shapes.set_checkpointing(level)
            kept.append(shapes.needs(size, 1))
    return kept


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("size", ["0.6B", "2B", "14B"])
def test_an_update_of_the_published_size_passes_on_shapes(size):
    kept = counted("train_cosmos.py", f"finetune_cosmos_{size.lower()}.yaml")
    parameters = load_manifest(f"dit_{size}", "cosmos")["parameter_count"]
    weights = (2 if size == "14B" else 4) * parameters
    for needs in kept:
        assert needs.weights == needs.gradients == weights
        assert needs.optimizer == pytest.approx(8 * parameters, rel=1e-5)
    assert kept[1].activations < 0.5 * kept[0].activations


@pytest.mark.slow
@pytest.mark.integration
def test_an_update_of_a_lora_on_the_published_network_passes_on_shapes():
    parameters = load_manifest("lora_2B_rank16", "cosmos")["parameter_count"]
    for needs in counted("train_cosmos_lora.py", "finetune_cosmos_2b_lora.yaml"):
        assert needs.weights == needs.gradients == 4 * parameters
        assert needs.optimizer == pytest.approx(8 * parameters, rel=1e-3)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("weights", [None, "float8_e4m3fn"])
def test_a_lora_on_2b_from_caches_fits_24_gb(weights):
    """As docs/cosmos.md says."""
    keys = [f"frozen_weights={weights}"] if weights else []
    (needs,) = counted("train_cosmos_lora.py", "finetune_cosmos_2b_lora.yaml", *keys, levels=(2,), cached=True)
    assert needs.frozen < (2.7 if weights else 4.2) * GIB  # the network and the autoencoder, and no T5
    assert needs.total < USABLE * 24 * GIB


@pytest.mark.slow
@pytest.mark.integration
def test_a_finetune_of_14b_from_caches_fits_eight_gpus_of_80_gb():
    """As docs/cosmos.md says."""
    (needs,) = counted("train_cosmos.py", "finetune_cosmos_14b.yaml", levels=(3,), processes=8, cached=True)
    parameters = load_manifest("dit_14B", "cosmos")["parameter_count"]
    assert needs.weights == 2 * parameters // 8
    assert needs.total < USABLE * 80 * GIB
