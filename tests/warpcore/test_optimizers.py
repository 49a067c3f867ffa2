"""Optimizers of our own take the steps of their authors'."""

import pytest
import torch
from torch import nn

from tests.golden import load_case, resolve
from warpcore import optim
from warpcore.optimizers.came import CAME
from warpcore.optimizers.lion import Lion
from warpcore.optimizers.prodigy import Prodigy
from warpcore.parameter_groups import ParameterGroup, optimizer_groups
from warpcore.sharded import full


@pytest.mark.parametrize("call", ["py_lion", "py_lion_decay", "opt_lion", "opt_lion_decay"])
def test_lion_takes_the_steps_of_its_authors_and_of_optimi(call):
    case, tensors = load_case("sd_t5/optimizers")
    (about,) = (one for one in case["calls"] if one["name"] == call)
    start, gradients_of, expected = (resolve(about[key], tensors) for key in ("start", "gradients", "parameters"))
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    defaults = about["defaults"]
    lion = Lion(
        [{"params": parameters, "param_names": ["a", "b"]}],
        lr=defaults["lr"], weight_decay=defaults["weight_decay"],
        betas=tuple(defaults.get("betas") or (defaults["beta1"], defaults["beta2"])),
    )  # fmt: skip
    for step in range(5):
        for parameter, gradient in zip(parameters, gradients_of, strict=True):
            parameter.grad = gradient[step].clone()
        optim.step([lion], torch.tensor(0.0))
        for parameter, after in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), after[step], atol=1e-6, rtol=0)


def test_adamw_with_decay_of_all_parameters_takes_the_steps_of_the_trainer_of_sd_with_t5():
    case, tensors = load_case("sd_t5/optimizers")
    about = next(one for one in case["calls"] if one["name"] == "adamw")
    start, gradients_of, expected = (resolve(about[key], tensors) for key in ("start", "gradients", "parameters"))
    named = {f"net.{place}": nn.Parameter(tensor.clone()) for place, tensor in enumerate(start)}
    decay = ParameterGroup(pattern="*", weight_decay=about["defaults"]["weight_decay"])
    optimizers = optim.build_optimizers("adamw", optimizer_groups({"net": {}}, named, [decay]), lr=0.01)
    for step in range(5):
        for parameter, gradient in zip(named.values(), gradients_of, strict=True):
            parameter.grad = gradient[step].clone()
        optim.step(optimizers, torch.tensor(0.0))
        for parameter, after in zip(named.values(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), after[step], atol=1e-6, rtol=0)


def test_adamw_with_decay_of_all_parameters_takes_the_steps_of_cosmos():
    """Its `fusedadamw` keeps float32 copies of bfloat16 weights: here the weights are float32."""
    case, tensors = load_case("cosmos/optimizer")
    given, start = case["kwargs"], resolve(case["start"], tensors)
    named = {f"net.{name}": nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    made = optimizer_groups({"net": {}}, named, [ParameterGroup(pattern="*", weight_decay=given["weight_decay"])])
    optimizers = optim.build_optimizers("adamw", made, lr=given["lr"], betas=tuple(given["betas"]), eps=given["eps"])
    for update in case["updates"]:
        for name, gradient in resolve(update["gradients"], tensors).items():
            named[f"net.{name}"].grad = gradient.clone()
        optim.step(optimizers, torch.tensor(0.0))
        copies, rounded = resolve(update["copies"], tensors), resolve(update["parameters"], tensors)
        for name, expected in copies.items():
            found = named[f"net.{name}"].detach()
            torch.testing.assert_close(found, expected, rtol=0, atol=case["suggested_atol"])
            torch.testing.assert_close(found.bfloat16().float(), rounded[name], rtol=2**-7, atol=0)


TARGET = torch.tensor([3.0, -2.0, 0.5, 10.0])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (
            0.0,
            [
                [1e-06, 1.5e-06, -1.5e-06, 1.5e-06, 1.5e-06],
                [9.03553e-06, 3.23203e-05, -3.23203e-05, 3.23203e-05, 3.23203e-05],
                [0.00329545, 0.0101695, -0.0101703, 0.0101776, 0.0101684],
                [1.6495, 3.54701, -1.16238, 0.754352, 9.44368],
            ],
        ),
        (
            0.05,
            [
                [1e-06, 1.5e-06, -1.5e-06, 1.5e-06, 1.5e-06],
                [9.03553e-06, 3.23203e-05, -3.23203e-05, 3.23203e-05, 3.23203e-05],
                [0.0032951, 0.010168, -0.0101688, 0.0101761, 0.0101669],
                [1.82342, 3.2369, -1.18034, 0.872564, 8.61064],
            ],
        ),
    ],
)
def test_prodigy_takes_the_steps_of_its_authors(decay, expected):
    """Numbers of prodigyopt 1.1.2 with use_bias_correction and safeguard_warmup, with a warm-up over 10 updates."""
    x = nn.Parameter(torch.zeros(4))

    def make_prodigy():
        group = {"params": [x], "param_names": ["x"]}
        return Prodigy([group], lr=1.0, weight_decay=decay, betas=(0.9, 0.99), eps=1e-8)

    prodigy, found = make_prodigy(), []
    for update in range(1, 61):
        x.grad = None
        ((x - TARGET).square().sum() / 8).backward()
        optim.set_lr([prodigy], min(update / 10, 1))
        optim.step([prodigy], torch.tensor(0.0))
        if update == 30:  # as if the run had been stopped and resumed
            state, prodigy = optim.optimizer_state([prodigy]), make_prodigy()
            optim.load_optimizer_state([prodigy], *state)
        if update in (5, 20, 40, 60):
            found.append([prodigy.d.item(), *x.tolist()])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-9)


def estimate_of_prodigy(parameters):
    """Prodigy's estimate after 60 updates towards `TARGET`, with parameters that together have its shape."""
    names = [str(i) for i in range(len(parameters))]
    groups = [{"params": [p], "param_names": [name]} for p, name in zip(parameters, names, strict=True)]
    prodigy = Prodigy(groups, lr=1.0, weight_decay=0.05, betas=(0.9, 0.99), eps=1e-8)
    for update in range(1, 61):
        prodigy.zero_grad()
        torch.cat([full(p) for p in parameters]).sub(TARGET).square().sum().div(8).backward()
        optim.set_lr([prodigy], min(update / 10, 1))
        optim.step([prodigy], torch.tensor(0.0))
    return optim.metrics([prodigy])["prodigy_d"].item()


def test_prodigy_has_one_estimate_over_all_groups():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    assert estimate_of_prodigy(parameters) == pytest.approx(1.82342, rel=1e-4)


CAMES_TARGETS = torch.tensor([[3.0, -2.0, 0.5], [10.0, 0.1, -1.0]]), torch.tensor([0.3, -4.0])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (
            0.0,
            [
                [0.153741, -0.240972, 0.195184, 0.442111, 0.0103944, -0.336773, 0.002, -0.002],
                [1.30202, -1.9958, 0.673716, 3.60375, 0.0854817, -1.45881, 0.0261768, -0.0263984],
                [3.14366, -1.96829, 0.57362, 11.7485, 0.0791375, -0.866461, 0.221264, -0.259181],
                [3.05009, -2.03312, 0.49051, 9.93685, 0.097762, -0.986171, 0.288349, -1.29017],
            ],
        ),
        (
            0.5,
            [
                [0.153741, -0.240972, 0.195184, 0.442111, 0.0103944, -0.336773, 0.002, -0.002],
                [1.28082, -1.96488, 0.661506, 3.54779, 0.0842022, -1.43287, 0.0258101, -0.0260286],
                [3.00623, -2.07858, 0.569851, 11.295, 0.0860192, -0.943264, 0.206505, -0.240605],
                [2.97938, -2.01074, 0.501918, 9.91567, 0.0974958, -0.990403, 0.281153, -1.03007],
            ],
        ),
    ],
)
def test_came_takes_the_steps_of_its_authors(decay, expected):
    """Numbers of came-pytorch 0.1.3, whose kernels are other matrices than ours."""
    parameters, found = [nn.Parameter(torch.zeros_like(target)) for target in CAMES_TARGETS], []
    group = {"params": parameters, "param_names": ["matrix", "vector"]}
    came = CAME([group], lr=0.02, weight_decay=decay, betas=(0.9, 0.99))
    for update in range(1, 61):
        came.zero_grad()
        sum((p - to).square().sum() / 8 for p, to in zip(parameters, CAMES_TARGETS, strict=True)).backward()
        optim.step([came], torch.tensor(0.0))
        if update in (1, 5, 20, 60):
            found.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_came_takes_a_kernel_as_a_matrix_and_keeps_two_vectors_of_each_square():
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    cames = [
        optim.build_optimizers("came", [{"params": [one], "param_names": ["w"]}], lr=0.02) for one in (kernel, matrix)
    ]
    for seed in range(3):
        kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.flatten(1)
        for came in cames:
            optim.step(came, torch.tensor(0.0))
    assert torch.equal(kernel.flatten(1), matrix)
    kept = optim.optimizer_state(cames[0])[0].values()
    assert sum(tensor.numel() for tensor in kept) == kernel.numel() + 2 * (4 + 12)
