"""The published sizes without the memory for them: updates on shapes, and what the planner counts."""

from pathlib import Path

import pytest

from families.dit import build
from families.dit.config import DitSettings
from modules.dit import DiT
from tests.golden import load_manifest
from warpcore.config import load_config
from warpcore.meta import only_shapes
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes, load_use_case

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("size", [256, 512])
def test_the_network_of_a_config_has_the_tensors_of_the_published_file(size):
    manifest = load_manifest(f"dit_xl_2_{size}x{size}", "opensora")
    with only_shapes():
        network = build.dit(DitSettings(), (size, size))
    assert isinstance(network, DiT)
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def counted(script: str, config: str) -> list[Needs]:
    """The memory of an update of eight samples on a GPU, without checkpointing and with all of it."""
    use_case = load_use_case(ROOT / "train" / script)
    settings = load_config(use_case.Config, [str(ROOT / "configs" / "training" / config)])
    with OnShapes(use_case, settings, "cuda") as shapes:
        size, kept = bucket_sizes(shapes.run)[0], []
        for level in (0, 3):
            shapes.set_checkpointing(level)
            kept.append(shapes.needs(size, 8))
    return kept


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    ("script", "config", "parameters"),
    [
        ("train_dit.py", "dit_xl2_256.yaml", 674_834_720),
        ("train_dit.py", "dit_xl2_512.yaml", 674_834_720),
        ("train_latte.py", "latte_xl2_ucf101.yaml", 673_799_072),
        ("train_pixart.py", "pixart_xl2_256.yaml", 610_856_096),
        ("train_pixart.py", "pixart_xl2_512.yaml", 610_856_096),
        ("train_pixart.py", "pixart_xl2_1024ms.yaml", 611_349_152),
    ],
)
def test_an_update_of_the_published_size_passes_on_shapes(script, config, parameters):
    kept = counted(script, config)
    for needs in kept:
        assert needs.weights == needs.gradients == 4 * parameters
        assert needs.optimizer == pytest.approx(8 * parameters, rel=1e-5)
        assert needs.ema == pytest.approx(4 * parameters, rel=1e-2)
    assert kept[1].activations < 0.5 * kept[0].activations
