"""An exponential moving average of weights, in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from warpcore.errors import UserError
from warpcore.loading import own_rows


@dataclass(frozen=True)
class PowerProfile:
    """How much of an average is kept so that it always reaches back over the same part of a run (arXiv:2312.02696).

    The weights of update t enter the average with a share that grows as t to the power of `exponent` (section 3.1).

    rate: the standard deviation of these shares over time, relative to the length of the run so far.
    iteration_shift: how many updates count as made before the first.
    """

    rate: float
    iteration_shift: int = 0

    @cached_property
    def exponent(self) -> float:
        """The largest root of x^3 + 7 x^2 + (16 - rate^-2) x + 12 - rate^-2."""
        inverse = self.rate**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def beta(self, update: int, every: int = 1) -> float:
        """The share that is kept at an update, counted from 1, of an average that moves at every `every` updates."""
        now = update + self.iteration_shift
        return max(1 - every / now, 0.0) ** (self.exponent + 1)


class EMA:
    """ema = beta * ema + (1 - beta) * weights, every `every` updates, counted from 1.

    Up to and including update `start` the average is a copy of the weights. Buffers aren't averaged but copied, frozen
    parameters are left out. The average is elementwise, so sharded parameters (DTensors) are averaged shard by shard,
    without communication.

    Args:
        source: a module, or named tensors of it (a training of few weights averages only those). Its weights have to
            be in place (loaded, moved, sharded) before.
        beta: the share that is kept, of each update the same or by a profile.
        device: where the average is kept; None: beside each weight. "cpu" frees device memory, and makes each change
            of the average wait for the device.
    """

    def __init__(
        self,
        source: nn.Module | Mapping[str, Tensor],
        *,
        start: int,
        every: int,
        beta: float | PowerProfile,
        device: torch.device | str | None = None,
    ):
        if every < 1 or start < 0 or not (isinstance(beta, PowerProfile) or 0.0 <= beta < 1.0):
            raise UserError(
                f"EMA needs ema_iters >= 1, 0 <= ema_beta < 1 and ema_start_iters >= 0; got ema_iters {every}, "
                f"ema_beta {beta}, ema_start_iters {start}"
            )
        self.start, self.every, self.beta, self.update = start, every, beta, 0
        self._live = named_tensors(source) if isinstance(source, nn.Module) else dict(source)
        averaged = dict(source.named_parameters()) if isinstance(source, nn.Module) else self._live
        self._averaged = {name for name, tensor in averaged.items() if tensor.is_floating_point()}
        self._average = {
            name: tensor.detach().to(
                device or tensor.device, torch.float32 if name in self._averaged else tensor.dtype, copy=True
            )
            for name, tensor in self._live.items()
        }
        self._swapped = False

    @torch.no_grad()
    def step(self, update: int, ok: Tensor | None = None, once_more: bool = False) -> None:
        """Takes in the weights after `update`. Where `ok` (one element) is false the average stays bit for bit.

        once_more: one time more than `every` says.
        """
        assert not self._swapped, "the weights hold the average now"
        self.update = update
        if update == self.start:
            self._follow()
        times = (update % self.every == 0) + once_more
        if update <= self.start or not times:
            return
        devices = {average.device for average in self._average.values()}
        taken = {d: torch.ones((), device=d) if ok is None else (ok.reshape(()).to(d) != 0).float() for d in devices}
        beta = self.beta.beta(update, self.every) if isinstance(self.beta, PowerProfile) else self.beta
        shares = {device: (1 - beta**times) * value for device, value in taken.items()}
        for name, average in self._average.items():
            average, live = _local(average), _local(self._live[name])
            live = live.to(average.device, average.dtype)
            if name in self._averaged:
                average.lerp_(live, shares[average.device])
            else:
                average.copy_(torch.where(taken[average.device] != 0, live, average))

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name: float32 (buffers in their own type), sharded like the weights, not copied."""
        assert not self._swapped, "the weights hold the average now"
        if self.update < self.start:
            self._follow()
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], update: int) -> None:
        """Restores `state_dict()` as it was after `update`.

        Raises:
            UserError: names or shapes differ.
        """
        for name in sorted(tensors.keys() ^ self._average.keys()):
            where = "the network lacks" if name in tensors else "the checkpoint lacks"
            raise UserError(f"EMA: {where} {name!r}")
        for name, average in self._average.items():
            if average.shape != tensors[name].shape:
                raise UserError(
                    f"EMA: {name!r} is {tuple(tensors[name].shape)} in the checkpoint, {tuple(average.shape)} here"
                )
            if average is not tensors[name]:
                average.copy_(tensors[name])
        self.update = update

    @torch.no_grad()
    def begin_with(self, tensors: Mapping[str, Tensor], update: int) -> None:
        """Begins, after `update`, with another average than a copy of the weights: whole tensors by name."""
        for name, average in self._average.items():
            _local(average).copy_(own_rows(average, tensors[name]))
        self.update = update

    def restart(self, update: int) -> None:
        """Begins again as a copy of the weights after `update`: a run that had no average so far."""
        self._follow()
        self.update = update

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` computes with the average; afterwards its weights are again what they were, bit for bit.

        Weights that are float32 on the same device change places with the average, tensor by tensor; of others a copy
        is kept. Inside, the average can be neither changed nor saved.
        """
        if self.update < self.start:
            yield
            return
        reshard(module)
        weights = {name: tensor for name, tensor in named_tensors(module).items() if name in self._average}
        assert weights.keys() == self._average.keys(), "the module lacks tensors of the average"
        kept = {name: _swap_in(weights[name], average) for name, average in self._average.items()}
        self._swapped = True
        try:
            yield
        finally:
            # FSDP may have left gathered copies of the average behind.
            reshard(module)
            for name, average in self._average.items():
                _swap_out(weights[name], average, kept[name])
            self._swapped = False

    @torch.no_grad()
    def _follow(self) -> None:
        for name, average in self._average.items():
            _local(average).copy_(_local(self._live[name]))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and persistent buffers by name, each tensor once."""
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {name: p for name, p in module.named_parameters() if p.requires_grad} | buffers


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def _swap_in(weight: Tensor, average: Tensor) -> Tensor | None:
    weight, average = _local(weight), _local(average)
    before = weight.clone()
    weight.copy_(average)
    if weight.dtype == average.dtype and weight.device == average.device:
        average.copy_(before)
        return None
    return before.to(average.device)


@torch.no_grad()
def _swap_out(weight: Tensor, average: Tensor, kept: Tensor | None) -> None:
    weight, average = _local(weight), _local(average)
    if kept is not None:
        weight.copy_(kept)
        return
    before = weight.clone()
    weight.copy_(average)
    average.copy_(before)


def reshard(module: nn.Module) -> None:
    """Drops the gathered copies that FSDP may have left behind, which would hide a change of the weights."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
