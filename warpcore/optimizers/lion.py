"""Lion (arXiv:2302.06675, algorithm 2): the sign of a moving average is the step. Its state is half of AdamW's."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from warpcore.sharded import local


class Lion(Optimizer):
    """The paper takes betas of 0.9 and 0.99 (0.95 and 0.98 where training is unstable), and compared with AdamW a
    learning rate 3 to 10 times smaller and a weight decay as many times larger."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                # All is element by element: each process steps on its own shard.
                weight, grad, average = map(local, (parameter, parameter.grad, state["exp_avg"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_((average * beta1).add_(grad, alpha=1 - beta1).sign_(), alpha=-group["lr"])
                average.mul_(beta2).add_(grad, alpha=1 - beta2)
