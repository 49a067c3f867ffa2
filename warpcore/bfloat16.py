"""Training weights that are kept in bfloat16: optimizers whose steps are rounded stochastically.

bfloat16 has 8 bits of precision, so rounding to the nearest would drop every step smaller than 1/512 of a weight:
most of them. Rounded up or down with probabilities that make the mean right, small steps add up as they should
(Gupta et al., arXiv:1502.02551, section 3.1).
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from warpcore.random import stable_hash
from warpcore.sharded import local


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 values (any shape) in bfloat16, each one of its two neighbours; over draws, their mean is the value."""
    # bfloat16 is the upper half of float32: noise in the lower half carries over as often as the fraction says.
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def store(parameter: Tensor, values: Tensor, name: str, step: int | None) -> None:
    """Put the float32 `values` (this process's part) into a parameter; into one in bfloat16 rounded stochastically.

    The noise follows from the parameter's name and the number of the step (None: to the nearest), so resuming is exact
    and copies of a network in several processes stay equal.
    """
    if parameter.dtype == torch.bfloat16 and step is not None:
        values = round_stochastically(values, _generator(parameter, name, step))
    local(parameter).copy_(values)


class StochasticAdamW(Optimizer):
    """AdamW (arXiv:1711.05101) on bfloat16 parameters, with its moments in float32. Groups carry `param_names`."""

    _step_supports_amp_scaling = True  # `found_inf` is obeyed on the device, see `warpcore.optim.step`

    def __init__(
        self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step; nothing changes where the attribute `found_inf`, if there is one, is not 0."""
        assert closure is None
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            group["steps"] += 1
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                ok = torch.ones((), device=parameter.device) if found_inf is None else 1 - found_inf
                stepped = _stepped(
                    *(local(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])),
                    state["step"], ok.to(parameter.device), group,
                )  # fmt: skip
                store(parameter, stepped, name, group["steps"])


def _stepped(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, ok: Tensor, group: dict
) -> Tensor:
    """The weight after a step, in float32; the moments change in place, by nothing where `ok` is 0."""
    beta1, beta2 = group["betas"]
    step += ok
    grad = torch.where(ok != 0, grad.float(), 0.0)
    mean.lerp_(grad, (1 - beta1) * ok)
    square.lerp_(grad.square(), (1 - beta2) * ok)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight, lr = weight.float(), group["lr"] * ok
    change = (mean / (1 - beta1**step)).div_(denominator).add_(weight, alpha=group["weight_decay"])
    # Before the first step that counts, both bias corrections divide by 0.
    return weight - torch.where(ok != 0, change, 0.0) * lr


class Stochastic(Optimizer):
    """Another optimizer, which steps on a float32 copy of each bfloat16 parameter, one at a time.

    Its steps have to be those of each parameter alone. Its state is in float32, and here; its groups, which carry
    `param_names`, are shared with it, so that what it counts in them counts here.
    """

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {"steps": 0})
        self.inner, self.class_name = inner, f"Stochastic{type(inner).__name__}"
        if hasattr(inner, "eval"):  # schedule-free: other weights for use
            self.eval, self.train = partial(self._call, inner.eval), partial(self._call, inner.train)

    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        self._call(self.inner.step, stochastic=True)

    @torch.no_grad()
    def _call(self, method: Callable[[], object], stochastic: bool = False) -> None:
        for group in self.param_groups:
            group["steps"] += stochastic
            after = {}
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if stochastic and parameter.grad is None:
                    continue
                weight = parameter.detach().float()
                weight.grad = None if parameter.grad is None else parameter.grad.float()
                own = {**group, "params": [weight]}
                self.inner.param_groups = [own]
                self.inner.state = defaultdict(dict, {weight: self.state[parameter]})
                method()
                store(parameter, local(weight), name, group["steps"] if stochastic else None)
                after = {key: value for key, value in own.items() if key != "params"}
            group.update(after)


def _generator(parameter: Tensor, name: str, step: int) -> torch.Generator | None:
    if parameter.device.type == "meta":
        return None
    return torch.Generator(parameter.device).manual_seed(stable_hash("rounding", name, step))
