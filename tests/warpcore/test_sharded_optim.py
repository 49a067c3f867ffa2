"""Optimizers with sharded weights, in two processes."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from tests.many_processes import run_in_two_processes
from tests.warpcore.test_optim import GROUPS, Net, assert_identical, build, make, muons_own, train, weights
from tests.warpcore.test_optimizers import estimate_of_prodigy
from warpcore import gradients, optim

TRAINED_ALIKE = ("adamw", "schedulefree", "lion", "prodigy", "came")
SHARDED = [name for name in optim.OPTIMIZERS if optim.supports_dtensor(name)]


def _sharded_run(expected) -> None:
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        for name in SHARDED:
            _check_resuming(name, mesh)
            _check_resuming(name, mesh, torch.bfloat16)
            _check_offloaded(name, mesh)
        for name in TRAINED_ALIKE:
            _check_training(name, mesh, *expected[name])
        _check_muon(mesh)
        sharded = [nn.Parameter(distribute_tensor(torch.zeros(n), mesh, [Replicate(), Shard(0)])) for n in (3, 1)]
        assert estimate_of_prodigy(sharded) == pytest.approx(1.82342, rel=1e-4)
    with pytest.raises(ValueError, match=r"adafactor can't.*write one of adamw, schedulefree"):
        _sharded("adafactor", mesh)


def _sharded(name, mesh, dtype=torch.float32):
    torch.manual_seed(0)
    net = Net().to(dtype)
    fully_shard(net, mesh=mesh)
    return net, build(name, net)


def _whole(net):
    return {name: tensor.full_tensor() for name, tensor in weights(net).items()}


def _check_resuming(name, mesh, dtype=torch.float32):
    net, optimizers = _sharded(name, mesh, dtype)
    train(net, optimizers, [1])
    tensors, rest = optim.optimizer_state(optimizers)
    again, resumed = _sharded(name, mesh, dtype)
    again.load_state_dict(weights(net))
    own = optim.allocate_optimizer_state(resumed, {key: (t.shape, t.dtype) for key, t in tensors.items()})
    for key, tensor in tensors.items():
        assert isinstance(own[key], DTensor) == isinstance(tensor, DTensor), key
        if isinstance(tensor, DTensor):
            assert own[key].placements == tensor.placements, key
    optim.load_optimizer_state(resumed, tensors, rest)
    train(net, optimizers, [2])
    train(again, resumed, [2])
    assert_identical(_whole(net), _whole(again))
    train(net, optimizers, [3], found_inf=1.0)
    assert_identical(_whole(net), _whole(again))


def _check_offloaded(name, mesh):
    """Weights of a mesh of GPUs that wait on the CPU step there, as those of a mesh of CPUs."""
    gpus = DeviceMesh.from_group(mesh.get_all_groups(), "cuda", mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
    tensors = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    start, *gradients = (distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]) for tensor in tensors)
    ends = []
    for place in (mesh, gpus):
        on = partial(_on_mesh, mesh=place)
        parameter = nn.Parameter(on(start))
        optimizers = optim.build_optimizers(name, [{"params": [parameter], "param_names": ["weight"]}], lr=0.1)
        optim.train_mode(optimizers)
        for gradient in gradients:
            parameter.grad = on(gradient)
            optim.step(optimizers, torch.tensor(0.0))
        ends.append(parameter.to_local())
    torch.testing.assert_close(*ends)


def _on_mesh(tensor, mesh):
    spec = DTensorSpec(mesh, tensor.placements, tensor._spec.tensor_meta)
    return DTensor(tensor.to_local().clone(), spec, requires_grad=False)


def _check_training(name, mesh, end, norms):
    net, optimizers = _sharded(name, mesh)
    begin = _whole(net)
    train(net, optimizers, [1, 2])
    for key, tensor in _whole(net).items():
        assert (tensor - end[key]).norm() <= 1e-3 * (end[key] - begin[key]).norm(), (name, key)
    for group, norm in gradients.gradient_norms(gradients.gradient_groups(net.named_parameters(), GROUPS)).items():
        torch.testing.assert_close(norm, norms[group], atol=1e-5, rtol=1e-4)


def _check_muon(mesh):
    """Against the same Newton-Schulz iteration in float64; torch's runs in bfloat16, which is worth 1 to 3%."""
    for shape in ((24, 8), (601, 8), (64, 64), (24, 2, 2, 2), (1, 8), (1, 2, 2, 2)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        start = [distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]) for tensor in (torch.zeros(shape), gradient)]
        parameter = nn.Parameter(start[0])
        parameter.grad = start[1]
        group = {"params": [parameter], "param_names": ["weight"]}
        optim.step(optim.build_optimizers("muon", [group], lr=1.0, **muons_own("weight", shape)), torch.tensor(0.0))
        x = gradient.flatten(1).double() / gradient.double().norm()
        for _ in range(5):
            square = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * square + 2.0315 * square @ square)
        expected = (-0.2 * max(x.shape) ** 0.5 * x).view(shape)
        assert (parameter.full_tensor() - expected).norm() <= 0.05 * expected.norm(), shape


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.bits
def test_two_processes_with_sharded_weights_step_like_one():
    expected = {}
    for name in TRAINED_ALIKE:
        net, optimizers = make(name)
        train(net, optimizers, [1, 2])
        norms = gradients.gradient_norms(gradients.gradient_groups(net.named_parameters(), GROUPS))
        expected[name] = (weights(net), norms)
    run_in_two_processes(_sharded_run, expected)
