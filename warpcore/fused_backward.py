"""The optimizer's step inside the backward pass: each parameter has it once its gradient is whole, and frees that.

    loss.backward()                       without: all gradients, then the norm, clipping, all steps
      gradient of the last layer          with: its step; freed
      gradient of the layer before        with: its step; freed
      ...

So memory holds the gradients of a few tensors in place of all (LOMO, arXiv:2306.09782, section 3, for optimizers with
state; `torch.Tensor.register_post_accumulate_grad_hook`). Autograd calls the hook of a parameter when all layers that
use it have added to its gradient, and so have computed with its value before the step.

Each step is what the same optimizer does for that parameter without this, bit for bit, noise of rounding included,
and state and checkpoints are the same. What has to know all gradients before the first step cannot be had: clipping by
their norm, one threshold for all, several micro-batches, Prodigy's estimate, sums over processes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from warpcore import gradients, optim
from warpcore.errors import UserError
from warpcore.gradients import Part


def check_one_process(fused: bool, num_processes: int) -> None:
    """Raises UserError where gradients are added up over processes, which ends after the backward pass."""
    if fused and num_processes > 1:
        raise UserError(
            f"fused_backward: gradients of {num_processes} processes are added up before a step, which this key makes "
            "before that: train with one process, or remove the key and write use_fsdp: true"
        )


_COUNTS_SKIPPED = "_step_supports_amp_scaling"
"""What optimizers have whose `step` is called, and counted, where `found_inf` says that it has to change nothing."""


class _Place(NamedTuple):
    """Where a parameter belongs."""

    name: str
    optimizer: Optimizer
    group: dict
    limit: float | None
    """The largest norm of its gradient."""
    parts: dict[str, list[Part]]
    """What of it is measured, by the group of `gradients.gradient_norms`."""
    means: dict[str, list[Tensor]]
    """The parameter, by each group of `gradients.gradient_means` that it is in."""


class _Measured(NamedTuple):
    """What a gradient was, as 0-d tensors on its device."""

    norm: Tensor
    norms: dict[str, Tensor]
    means: dict[str, Tensor]


class FusedBackward:
    """Steps `parameters` in every backward pass from now on, until `close`.

    A gradient that is not finite changes nothing of its parameter and of those that the pass comes to after it; what
    was stepped before it stays so. This is decided on the device, without waiting: what an optimizer counts beside it
    (the steps of Adafactor and adamw8bit, the shares of schedulefree) goes on.

    Args:
        parameters: those that are trained, by name.
        norm_groups, mean_groups: of what is reported, see `gradients.clipped`.
        largest_norm: of all gradients together; each is clipped to its share of it.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Mapping[str, Tensor],
        norm_groups: Mapping[str, list[Part]],
        mean_groups: Mapping[str, list[Tensor]],
        largest_norm: float | None = None,
    ):
        self._optimizers, self._norm_groups, self._mean_groups = list(optimizers), norm_groups, mean_groups
        limits = gradients.tensor_limits(list(parameters.values()), largest_norm)
        self._places = {
            parameter: _Place(name, optimizer, group, limits.get(parameter), {}, {})
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        for name, parts in norm_groups.items():
            for part in parts:
                self._places[part.parameter].parts.setdefault(name, []).append(part)
        for name, own in mean_groups.items():
            for parameter in own:
                self._places[parameter].means[name] = [parameter]
        self._order = list(parameters.values())
        self._handles = [one.register_post_accumulate_grad_hook(self._arrived) for one in self._order]
        self._times: Tensor | None = None
        self._ok = torch.ones((), dtype=torch.bool, device=self._order[0].device)
        """Whether all gradients of this pass have been finite so far."""
        self._measured: dict[Tensor, _Measured] = {}
        self._progress: dict[int, dict] = {}
        """Groups after a step of one of their parameters, by the id of the group."""

    def backward(self, loss: Tensor, times: Tensor | None = None) -> None:
        """The backward pass of the one micro-batch of an update, with all its steps; none where the loss isn't finite.

        times: what to multiply gradients with (0-d), if it is given.
        """
        self._ok, self._times = torch.isfinite(loss.detach()), times
        loss.backward()

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """End the update; what `gradients.clipped` tells of its gradients. They are 0 where no pass was made."""
        self._count_steps()
        measured = [self._measured[one] for one in self._order if one in self._measured]
        norm = _norm([one.norm for one in measured], self._ok)
        norms = {
            f"grad_norm/{name}": _norm([one.norms[name] for one in measured if name in one.norms], self._ok)
            for name in self._norm_groups
        }
        for name in self._mean_groups:
            pieces = [one.means[name] for one in measured if name in one.means]
            norms[f"grad_mean/{name}"] = torch.stack(pieces).sum() if pieces else _norm([], self._ok)
        self._measured, self._progress = {}, {}
        return norm, norms

    def close(self) -> None:
        """Step no more."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        place = self._places[parameter]
        if self._times is not None:
            parameter.grad.mul_(self._times)
        means = gradients.gradient_means(place.means)
        norm = gradients.clip_tensor(parameter, place.limit)
        self._measured[parameter] = _Measured(norm, gradients.gradient_norms(place.parts), means)
        self._ok = self._ok & torch.isfinite(norm)
        own = place.group | {"params": [parameter], "param_names": [place.name]}
        whole, place.optimizer.param_groups = place.optimizer.param_groups, [own]
        try:
            _step_where(self._ok, place.optimizer, parameter)
        finally:
            place.optimizer.param_groups = whole
            parameter.grad = None
        self._progress[id(place.group)] = own

    def _count_steps(self) -> None:
        """What groups count goes on by one step, as of all their parameters at once; where no pass was made, of those
        optimizers that count skipped steps."""
        for optimizer in self._optimizers:
            if not self._measured and not getattr(optimizer, _COUNTS_SKIPPED, False):
                continue
            for group in optimizer.param_groups:
                if (after := self._progress.get(id(group))) is not None:
                    group.update({key: after[key] for key in after.keys() - {"params", "param_names"}})
                elif "steps" in group:  # none of them had a gradient
                    group["steps"] += 1


def _norm(norms: list[Tensor], beside: Tensor) -> Tensor:
    """That of tensors together which have these norms."""
    if not norms:
        return torch.zeros((), device=beside.device)
    return torch.linalg.vector_norm(torch.stack(norms))


def _step_where(ok: Tensor, optimizer: Optimizer, parameter: Tensor) -> None:
    """A step of an optimizer whose only parameter this is; it changes nothing on its device where not `ok` (0-d)."""
    if getattr(optimizer, _COUNTS_SKIPPED, False):
        optim.step([optimizer], ~ok)
        return
    # `optim.step` reads the decision once for all; read for each parameter, it would stop the device every time.
    state = optimizer.state[parameter].values()
    there = [one for one in (parameter, *state) if isinstance(one, Tensor) and one.device == parameter.device]
    before = [one.detach().clone() for one in there]
    parameter.grad.masked_fill_(~ok, 0)  # state that the first step makes begins with finite numbers
    optimizer.step()
    for now, then in zip(there, before, strict=True):
        now.copy_(torch.where(ok, now, then))
