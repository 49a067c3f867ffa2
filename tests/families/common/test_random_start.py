"""Networks from scratch are drawn layer by layer, each process its rows, the same numbers on any number of them."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from families.common import random_start as module
from families.common.random_start import RandomWeights, random_start
from tests.made_up_family.networks import Cloud
from tests.many_processes import run_in_two_processes
from warpcore.config import Config, make_config
from warpcore.loading import deferring
from warpcore.meta import PeakMemory
from warpcore.placement import Placement
from warpcore.sharded import full, local

CPU = torch.device("cpu")
WIDTH, SEED = 48, 5


def build() -> Cloud:
    return Cloud(width=WIDTH, depth=6)


def initialise(name: str, layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)


def expected() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        network = build()
    return dict(RandomWeights(network, initialise, SEED))


def test_numbers_follow_from_the_seed_and_the_name_and_from_no_order():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    numbers = expected()
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn elsewhere stays what it is
    with torch.device("meta"):
        network = build()
    backwards = RandomWeights(network, initialise, SEED)
    assert {name: backwards[name].shape for name in reversed(list(backwards))} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    assert all(torch.equal(backwards[name], numbers[name]) for name in reversed(list(backwards)))
    with torch.device("meta"):
        other = RandomWeights(build(), initialise, SEED + 1)
    assert all(not torch.equal(other[name], tensor) for name, tensor in numbers.items())
    assert not torch.equal(numbers["puffs.0.inner.weight"], numbers["puffs.1.inner.weight"])


def test_small_networks_are_drawn_whole_from_the_stream_of_the_run():
    torch.manual_seed(1)
    plain = build()
    for layer in plain.modules():
        initialise("", layer)
    torch.manual_seed(1)
    with deferring():
        found = random_start(build, initialise, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), plain.parameters(), strict=True))


@pytest.mark.integration
def test_each_process_holds_its_rows_and_one_layer(tmp_path):
    run_in_two_processes(_place)


def _place() -> None:
    module.DRAWN_WHOLE = 0
    keys = {"experiment_id": "a", "checkpoint_path": "a", "updates": 1, "webdataset_path": "a.tar", "batch_size": 2}
    keys |= {"use_fsdp": True, "device": "cpu"}
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    torch.manual_seed(SEED)
    with deferring(), PeakMemory(device="cpu") as memory:
        network = random_start(build, initialise, torch.float32)
        assert memory.peak == 0
        Placement(make_config(Config, keys), CPU, torch.float32, mesh).place_trained("cloud", network)
    shard = sum(local(p).nbytes for p in network.parameters())
    layer = max(sum(p.numel() * 4 for p in each.parameters(recurse=False)) for each in network.modules())
    assert shard <= memory.peak <= shard + 1.1 * layer, (shard, memory.peak, layer)
    assert all(torch.equal(full(p.detach()), expected()[name]) for name, p in network.named_parameters())
