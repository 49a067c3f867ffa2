"""Prodigy (arXiv:2306.06101, algorithm 4): AdamW that estimates its learning rate from how far the weights have gone.

With the two options that trainers of diffusion models recommend: Adam's bias correction, and an estimate that a
warm-up of the learning rate does not drive up (`safeguard_warmup` of the authors' package).
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor
from torch.optim import Optimizer

from warpcore.bfloat16 import store
from warpcore.sharded import local, sum_over_shards

D0 = 1e-6
"""The first estimate, which only has to be too small."""


class Prodigy(Optimizer):
    """The learning rate of a group is a factor on the estimate `d`, which all groups share and which only grows.

    Everything stays on the device. `d` and the numerator of its estimate are part of every parameter's state, which
    is one and the same tensor, so that checkpoints hold them under the parameters' names. Parameters in bfloat16 are
    rounded stochastically; their moments are float32.
    """

    def __init__(
        self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "steps": 0})
        device = self.param_groups[0]["params"][0].device
        self.d = torch.full((), D0, device=device)
        self._numerator = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        gains, sizes, used = [], [], []
        for group in self.param_groups:
            group["steps"] += 1
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                if group["lr"] > 0:
                    gain, size = _observe(parameter, state, group, self.d)
                    gains.append(gain)
                    sizes.append(size)
                    used.append((name, parameter, group))
        if not used:
            return
        # All parameters are on one mesh, and sharded alike.
        gain, size = sum_over_shards(torch.stack([torch.stack(gains).sum(), torch.stack(sizes).sum()]), used[0][1])
        self._numerator.mul_(sqrt(self.param_groups[0]["betas"][1])).add_(gain)
        before = self.d.clone()
        # Gradients that are all 0 tell nothing.
        self.d.copy_(torch.where(size > 0, torch.maximum(self.d, self._numerator / size), self.d))
        for name, parameter, group in used:
            moved = _moved(parameter, self.state[parameter], group, before * _rate(group), self.d)
            store(parameter, moved, name, group["steps"])

    def _state_of(self, parameter: Tensor) -> dict:
        state = self.state[parameter]
        if not state:
            state |= {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq", "s")}
            state |= {"p0": parameter.detach().clone(), "d": self.d, "d_numerator": self._numerator}
        return state


def _rate(group: dict) -> float:
    """The factor on `d` that is the learning rate of a step."""
    beta1, beta2 = group["betas"]
    return group["lr"] * sqrt(1 - beta2 ** group["steps"]) / (1 - beta1 ** group["steps"])


def _observe(parameter: Tensor, state: dict, group: dict, d: Tensor) -> tuple[Tensor, Tensor]:
    """Take a gradient into the moments; what this process's shard adds to both sums of the estimate."""
    weight, grad, start = (local(tensor).float() for tensor in (parameter, parameter.grad, state["p0"]))
    average, square, s = (local(state[key]) for key in ("exp_avg", "exp_avg_sq", "s"))
    beta1, beta2 = group["betas"]
    scaled = grad * d
    average.mul_(beta1).add_(scaled, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
    s.mul_(sqrt(beta2)).add_(scaled.mul_(d / D0))  # divided by D0, or the numbers would be too small for float32
    return torch.sum(grad * (start - weight)) * (d / D0 * d * _rate(group)), s.abs().sum()


def _moved(parameter: Tensor, state: dict, group: dict, lr: Tensor, d: Tensor) -> Tensor:
    """The weight after a step, in float32."""
    weight, average, square = map(local, (parameter, state["exp_avg"], state["exp_avg_sq"]))
    weight = weight.float() * (1 - lr * group["weight_decay"])
    return weight.sub_((average * lr).div_(square.sqrt().add_(d * group["eps"])))
