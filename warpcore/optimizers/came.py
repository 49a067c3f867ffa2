"""CAME (arXiv:2307.02047, algorithm 2): AdamW's moments in the memory of one of them.

The squares of gradients are kept as the mean of each row and of each column, as Adafactor does, and so is how far each
step lies from their average: where steps agree, the average moves the weights further.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from warpcore.sharded import local, sum_over_shards

SQUARE_EPS, INSTABILITY_EPS = 1e-30, 1e-16
"""Added to squares of gradients, and to those of distances from the average."""
MAX_RMS = 1.0
"""The largest root mean square of a step, before averaging: d in the paper."""
INSTABILITY_BETA = 0.9999
"""beta3 in the paper."""


class CAME(Optimizer):
    """The paper takes betas of 0.9 and 0.999, and a warm-up: nothing corrects the averages' begin at 0.

    A kernel counts as the matrix (outputs, inputs x positions) that it multiplies by. Vectors keep all their squares,
    and have no instability, as in the authors' program. Of sharded matrices, the processes have to share three small
    sums in each step.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= _first_state(parameter)
                    _step(parameter, state, group)


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    state = {"exp_avg": torch.zeros_like(parameter)}
    if parameter.ndim < 2:
        return state | {"exp_avg_sq": torch.zeros_like(parameter)}
    for name in ("exp_avg_sq", "exp_avg_res"):
        rows = torch.zeros_like(parameter).flatten(1).sum(dim=1)  # sharded as the parameter, and where it is
        columns = local(parameter).flatten(1).shape[1]
        state |= {f"{name}_row": rows, f"{name}_col": local(rows).new_zeros(columns)}
    return state


def _step(parameter: Tensor, state: dict[str, Tensor], group: dict) -> None:
    beta1, beta2 = group["betas"]
    weight, grad, average = map(local, (parameter, parameter.grad, state["exp_avg"]))
    squares = grad.square().add_(SQUARE_EPS)
    if parameter.ndim < 2:
        scale = local(state["exp_avg_sq"]).lerp_(squares, 1 - beta2).rsqrt()
    else:
        scale = _factored(parameter, state, "exp_avg_sq", squares, beta2)
    step = scale.mul_(grad)
    rms = (sum_over_shards(step.square().sum(), parameter) / parameter.numel()).sqrt()
    step.div_((rms / MAX_RMS).clamp(min=1.0))
    average.lerp_(step, 1 - beta1)
    if parameter.ndim < 2:
        move = average
    else:
        distances = step.sub_(average).square_().add_(INSTABILITY_EPS)
        move = _factored(parameter, state, "exp_avg_res", distances, INSTABILITY_BETA).mul_(average)
    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move * group["lr"])


def _factored(parameter: Tensor, state: dict[str, Tensor], name: str, values: Tensor, beta: float) -> Tensor:
    """1 / sqrt of the average of `values` (this process's rows), which is known by its rows and columns alone."""
    rows, columns, matrix = local(state[f"{name}_row"]), state[f"{name}_col"], values.flatten(1)
    rows.lerp_(matrix.mean(dim=1), 1 - beta)
    columns.lerp_(sum_over_shards(matrix.sum(dim=0), parameter) / parameter.shape[0], 1 - beta)
    # The mean of all rows is that of all columns, which every process knows.
    return torch.outer((rows / columns.mean()).rsqrt_(), columns.rsqrt()).view(values.shape)
