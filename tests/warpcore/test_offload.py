"""What waits in the CPU's memory changes no update, and is not on the device meanwhile."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.fake_gpu import GPU, FakeGpu
from tests.modules.test_feed_forward import network
from tests.modules.test_quantise import INPUTS
from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, files, settings, train, use_case  # noqa: F401
from tests.warpcore.runs import numbers
from warpcore.config import ConfigError, make_config
from warpcore.meta import META, MixMetaWithCPU, PeakMemory
from warpcore.offload import OnDemand, keep_inputs_on_cpu

CPU = torch.device("cpu")
WITHOUT_CHECKPOINTING = {"train_a", "train_b joint", "train_encoder", "train_towers", "train_towers t5"}
"""Scripts whose networks have no blocks that compute their activations again."""
COMMON = {"grad_accum_steps": 2, "activation_checkpointing": 3}


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize(
    "name",
    represented_by("train_c_lora", of=SETTINGS.keys() - WITHOUT_CHECKPOINTING),
)
def test_offloaded_encoders_and_activations_change_no_bit(settings, name):  # noqa: F811
    common = (
        COMMON
        | {"updates": 2}
        | ({"clip_image_dropout": 0.5} if "clip_image_dropout" in use_case(name).Config.model_fields else {})
    )
    here, away = settings(name, "here", **common), settings(name, "away", **common)
    assert numbers(train(name, away | {"offload": ["encoders", "activations"]})) == numbers(train(name, here))
    ours, theirs = files(away), files(here)
    assert all(torch.equal(ours[file][key], t) for file, tensors in theirs.items() for key, t in tensors.items())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - WITHOUT_CHECKPOINTING))
def test_weights_in_the_memory_of_the_cpu_change_no_update_of_one_process(settings, name):  # noqa: F811
    """In three parts: with offload, without, and with it again."""
    whole, parts = (settings(name, run, **COMMON, updates=3) for run in ("whole", "parts"))
    offload = {"use_fsdp": True, "fsdp_cpu_offload": True}
    train(name, parts | offload | {"updates": 1})
    train(name, parts | {"updates": 2})
    kind = use_case(name)
    run = kind(make_config(kind.Config, parts | offload))
    run.setup()
    assert any(isinstance(network, FSDPModule) for network in run.networks.values())
    run.close()
    lines = train(name, parts | offload)
    for line, other in zip(lines, train(name, whole), strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    ours, theirs = files(parts), files(whole)
    for file, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[file][key], tensor, rtol=0, atol=1e-5, msg=f"{file} {key}")


class GpuBesidePinnedMemory(FakeGpu):
    """Also makes tensors in pinned memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_a_network_on_demand_is_on_the_gpu_only_while_it_is_called_and_nothing_waits():
    frozen = network().eval().requires_grad_(False)
    seen = []
    frozen.blocks[-1].register_forward_hook(lambda *_: seen.append({p.device for p in frozen.parameters()}))
    with GpuBesidePinnedMemory() as gpu:
        OnDemand(frozen, GPU)
        inputs = {name: tensor.to(GPU) for name, tensor in INPUTS.items()}
        assert {p.device for p in frozen.parameters()} == {CPU}
        with gpu.watched():
            output = frozen(**inputs)
        assert output.device == GPU
        assert {p.device for p in frozen.parameters()} == {CPU}
    assert seen[-1] == {GPU}


@pytest.mark.bits
def test_the_copies_of_a_network_on_demand_do_not_outlive_the_call():
    plain, frozen = (network().eval().requires_grad_(False) for _ in range(2))
    on_demand = OnDemand(frozen, CPU)
    outputs, memories = [], []
    for one in (plain, frozen):
        with PeakMemory((*one.parameters(), *one.buffers())) as memory:
            outputs.append(one(**INPUTS))
        memories.append(memory)
    assert torch.equal(*outputs)
    assert memories[0].alive == memories[1].alive
    assert memories[1].peak == memories[0].peak + on_demand.nbytes


@pytest.mark.bits
def test_a_network_that_gradients_pass_through_comes_to_stay():
    frozen, known = (network().eval().requires_grad_(False) for _ in range(2))
    for one in (frozen, known):
        one.set_activation_checkpointing(3)
    on_demand = OnDemand(frozen, CPU)
    gradients = []
    for one in (frozen, known):
        x = INPUTS["x"].clone().requires_grad_()
        one(**INPUTS | {"x": x}).square().sum().backward()
        gradients.append(x.grad)
    assert on_demand.stays
    assert torch.equal(*gradients)


def test_maps_come_back_to_the_gpu():
    trained = network()
    trained.set_activation_checkpointing(3)
    keep_inputs_on_cpu(trained)
    with GpuBesidePinnedMemory():
        trained.to(GPU)
        trained(**{name: tensor.to(GPU) for name, tensor in INPUTS.items()}).square().mean().backward()
        assert {parameter.grad.device for parameter in trained.parameters()} == {GPU}


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_the_maps_of_checkpointed_blocks_wait_on_the_cpu_and_nothing_else(level):
    networks, maps, waiting, on_device = [network(), network()], [], [], []
    keep_inputs_on_cpu(networks[0])
    for one in networks:
        one.set_activation_checkpointing(level)
        one.to(META)
    for block in networks[0].blocks:
        if block.checkpointed:
            block.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0].nbytes))
    for one in networks:
        with MixMetaWithCPU(), PeakMemory(one.parameters(), "meta") as memory, PeakMemory(device="cpu") as kept:
            output = one(**{name: tensor.to(META) for name, tensor in INPUTS.items()})
            waiting.append(kept.alive)
            on_device.append(memory.alive)
            del output
    assert waiting[0] - waiting[1] == sum(maps)
    assert (len(maps) > 0) == (level > 0)
    # Few of them stay for other reasons too: a layer between blocks keeps its input, and so does a skip.
    assert on_device[1] - on_device[0] >= 0.7 * sum(maps)


def test_activations_are_offloaded_only_with_checkpointing_and_unknown_names_are_refused(settings):  # noqa: F811
    config, given = use_case("train_c").Config, settings("train_c", "refused")
    with pytest.raises(ConfigError, match="set that to 1, 2 or 3"):
        make_config(config, given | {"offload": ["activations"]})
    with pytest.raises(ConfigError, match="offload: found 'encoder', but input should be 'encoders' or 'activations'"):
        make_config(config, given | {"offload": ["encoder"]})
