"""Layers that start from scratch begin as their network does without a file."""

import pytest
import torch

from families.cosmos.build import transformer
from families.cosmos.config import CosmosSettings
from families.dit.pixart_build import denoiser
from families.dit.pixart_config import PixartSettings
from modules.dit import DiT
from warpcore.from_scratch import Start, fresh_layers, start_layers

NETWORKS = {
    "dit": lambda: DiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=4),
    "pixart": lambda: denoiser(PixartSettings(model_version="mini")),
    "cosmos": lambda: transformer(CosmosSettings(model_version="mini")),
}


@pytest.mark.parametrize("family", NETWORKS)
def test_every_layer_of_a_transformer_may_begin_as_its_network_begins(family):
    """The numbers are others, their distribution is the same: zero where that is."""
    torch.manual_seed(0)
    network = NETWORKS[family]()
    parameters = dict(network.named_parameters())
    expected = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    with torch.no_grad():
        for tensor in parameters.values():
            tensor.fill_(7)
    layers = fresh_layers({"net": network}, [Start(pattern="*")])
    start_layers(layers, {f"net.{name}": tensor for name, tensor in parameters.items()}, seed=0)
    assert any(not tensor.any() for tensor in expected.values())
    for name, tensor in parameters.items():
        deviation = expected[name].std().item()
        assert tensor.std().item() == pytest.approx(deviation, rel=0.3, abs=1e-6), name
        assert tensor.mean().item() == pytest.approx(expected[name].mean().item(), abs=deviation / 2 + 1e-6), name
