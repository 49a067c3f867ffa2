"""Networks larger than a machine's memory: built on the meta device, their weights read where they will be."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from modules.lora import LoraSettings, add_adapters
from tests.made_up_family.networks import Cloud
from tests.many_processes import run_in_two_processes
from warpcore.config import Config, make_config
from warpcore.loading import _WAITING, assign, deferring, load_deferred
from warpcore.meta import PeakMemory
from warpcore.placement import Placement
from warpcore.sharded import full, local

CPU = torch.device("cpu")


def cloud() -> Cloud:
    with torch.device("meta"):
        return Cloud(width=48, depth=6)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Cloud(width=48, depth=6).state_dict()


def deferred(stored: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Cloud:
    network = cloud()
    with deferring():
        assign(network, stored, dtype, deferrable=True)
    return network


def test_weights_wait_for_their_place_and_keep_their_dtype(stored):
    network = deferred(stored, torch.bfloat16)
    assert all(p.is_meta for p in network.parameters())
    network.stem.requires_grad_(False)
    load_deferred(network, CPU)
    load_deferred(network, CPU)  # there is nothing more to do
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, stored[name].to(torch.bfloat16))
        assert parameter.requires_grad == (not name.startswith("stem"))


def test_weights_do_not_wait_where_they_are_needed_at_once(stored):
    for network, may_wait in ((cloud(), False), (cloud(), True)):
        with deferring():
            if not may_wait:
                assign(network, stored, torch.float32)
        if may_wait:
            assign(network, stored, torch.float32, deferrable=True)
        assert all(torch.equal(p, stored[name]) for name, p in network.named_parameters())


def test_what_has_values_keeps_them_and_one_tensor_of_two_names_stays_one(stored):
    network = deferred(stored)
    add_adapters(network, ["puffs"], LoraSettings(2, alpha=2))
    adapters = {name: p.clone() for name, p in network.named_parameters() if ".lora." in name}
    load_deferred(network, CPU)
    now = dict(network.named_parameters())
    assert adapters
    assert all(torch.equal(now[name], value) for name, value in (adapters | stored).items())

    tied = nn.Sequential(nn.Linear(3, 3, bias=False, device="meta"), nn.Linear(3, 3, bias=False, device="meta"))
    tied[1].weight = tied[0].weight
    with deferring():
        assign(tied, {"0.weight": torch.eye(3), "1.weight": torch.eye(3)}, torch.float32, deferrable=True)
    load_deferred(tied, CPU)
    assert tied[0].weight is tied[1].weight


@pytest.mark.integration
@pytest.mark.parametrize("offload", [False, True])
def test_each_process_reads_its_rows_and_holds_no_more_than_a_tensor_beside_them(stored, tmp_path, offload):
    save_file(stored, tmp_path / "cloud.safetensors")
    run_in_two_processes(_place, tmp_path / "cloud.safetensors", offload)


def _place(file: Path, offload: bool) -> None:
    from families.common.weights import with_weights

    keys = {"experiment_id": "a", "checkpoint_path": "a", "updates": 1, "webdataset_path": "a.tar", "batch_size": 2}
    keys |= {"use_fsdp": True, "fsdp_cpu_offload": offload, "device": "cpu", "weights_dtype": "bfloat16"}
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    placement = Placement(make_config(Config, keys), CPU, torch.bfloat16, mesh)
    for place in (partial(placement.place_trained, "cloud"), partial(placement.place_frozen, "cloud")):
        with deferring():
            network = with_weights(lambda: Cloud(width=48, depth=6), file, "file", deferrable=True)
        mapped = getattr(network, _WAITING).values()
        with PeakMemory(mapped, device="cpu") as memory:
            place(network)
        kept = [local(p) for p in network.parameters()]
        assert {p.dtype for p in kept} == {torch.bfloat16}
        whole = [p.numel() * p.itemsize for p in network.parameters()]
        shard = sum(p.nbytes for p in kept)
        assert shard <= sum(whole) * 0.6
        assert shard <= memory.peak <= shard + max(whole), (shard, memory.peak, max(whole))
        expected = with_weights(lambda: Cloud(width=48, depth=6), file, "file").state_dict()
        for name, parameter in network.named_parameters():
            assert torch.equal(full(parameter.detach()), expected[name].to(torch.bfloat16)), name
        times, letters = torch.zeros(2), torch.zeros(2, 8, dtype=torch.bfloat16)
        made = network(torch.ones(2, 4, 4, 4, dtype=torch.bfloat16), times, letters)
        assert made.isfinite().all()
