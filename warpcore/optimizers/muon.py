"""Muon for matrices, and for the kernels of convolutions, each as the matrix (outputs, inputs x positions) that it
multiplies by.

https://kellerjordan.github.io/posts/muon/, with rates matched to AdamW's (arXiv:2502.16982, section 2.2), as
`torch.optim.Muon` computes for matrices alone, of which it steps on none that has fewer rows than processes share it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a x + b x^3 + c x^5, which drives singular values towards 1."""
ITERATIONS = 5


class Muon(Optimizer):
    """Momentum, made orthogonal, of matrices and kernels, whole ones or ones sharded by their outputs."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(kernel.grad)
                average = state["momentum_buffer"].lerp_(kernel.grad, 1 - group["momentum"])
                direction = kernel.grad.lerp(average, group["momentum"]).flatten(1)
                rate = 0.2 * max(direction.shape) ** 0.5 * group["lr"]
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                found = orthogonal(direction).view(kernel.shape)
                if isinstance(kernel, DTensor):  # products may be whole on every process
                    found = found.redistribute(placements=kernel.placements)
                kernel.add_(found, alpha=-rate)


class KernelMuon(Muon):
    """That of kernels: checkpoints tell the two apart by their names."""


def orthogonal(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """About the nearest matrix of (M, N) whose singular values are all 1, by Newton-Schulz iterations in bfloat16."""
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.bfloat16().T if is_tall else matrix.bfloat16()).clone()
    x /= x.norm().clamp(min=eps)
    for _ in range(ITERATIONS):
        squares = x @ x.T
        x = torch.addmm(x, torch.addmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
