"""Classifier-free guidance (arXiv:2207.12598): conditions in pairs, and predictions put together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Condition = Tensor | None | Sequence[Tensor | None]
Conditions = Mapping[str, Condition]


@dataclass(frozen=True)
class Guidance:
    """How strongly a sample follows its conditions.

    Args:
        scale: weight of the condition, as in unconditional + scale * (conditional - unconditional). Two numbers (p, q)
            mean p * t + q * (1 - t); a function gets t.
        rho: share of the rescaled prediction, which has the deviation of the conditional one (arXiv:2305.08891,
            section 3.4); 0 for none.
        t_start, t_stop: guide only while t_stop <= t <= t_start.
        rescale_over_batch: take one deviation over the whole batch instead of one per sample. So does the published
            implementation, but a picture then depends on the others of its batch.
        channels: guide only this number of channels, the first ones; the others are those of the conditional
            prediction. The published DiT and Open-Sora 1.0 guide three of four.
    """

    scale: float | Sequence[float] | Callable[[float], float]
    rho: float = 0.7
    t_start: float | None = None
    t_stop: float | None = None
    rescale_over_batch: bool = False
    channels: int | None = None

    def __post_init__(self):
        if isinstance(self.scale, Sequence) and len(self.scale) != 2:
            raise ValueError(f"cfg is a number, two numbers (at t = 1 and t = 0) or a function of t, not {self.scale}")

    def scale_at(self, t: float) -> float | None:
        """The scale at time t, None outside the window."""
        if (self.t_start is not None and t > self.t_start) or (self.t_stop is not None and t < self.t_stop):
            return None
        if callable(self.scale):
            return self.scale(t)
        if isinstance(self.scale, Sequence):
            return self.scale[0] * t + self.scale[1] * (1 - t)
        return self.scale

    def combine(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided prediction from the two predictions (B, C, ...)."""
        if self.channels is None:
            return self._combine(conditional, unconditional, scale)
        guided = self._combine(conditional[:, : self.channels], unconditional[:, : self.channels], scale)
        return torch.cat([guided, conditional[:, self.channels :]], dim=1)

    def _combine(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = torch.lerp(unconditional, conditional, scale)
        if self.rho == 0:
            return guided
        over = None if self.rescale_over_batch else tuple(range(1, guided.dim()))
        wanted, found = (pred.std(dim=over, keepdim=True) for pred in (conditional, guided))
        return self.rho * guided * wanted / (found + 1e-9) + (1 - self.rho) * guided


def expand_conditions(conditions: Conditions, batch_size: int) -> dict[str, Condition]:
    """Conditions with `batch_size` samples each: those of one sample are repeated, another number is a ValueError."""

    def expand(name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] not in (1, batch_size):
            raise ValueError(
                f"condition {name} has shape {tuple(tensor.shape)}, but the batch holds {batch_size} samples"
            )
        return tensor.expand(batch_size, *tensor.shape[1:])

    return {name: _each(name, value, expand) for name, value in conditions.items()}


def pair_conditions(conditions: Conditions, unconditional: Conditions | None, batch_size: int) -> dict[str, Condition]:
    """Each condition with its unconditional one of the same name behind it: (2 * batch_size, ...).

    Without `unconditional`, zeros take its place. A name that only one side has is a ValueError, and so is None or
    another shape on only one side.
    """
    conditions = expand_conditions(conditions, batch_size)
    if unconditional is None:
        zeros = {name: _each(name, value, lambda _, t: torch.zeros_like(t)) for name, value in conditions.items()}
        unconditional = zeros
    missing = {
        "unconditional": sorted(conditions.keys() - unconditional.keys()),
        "conditional": sorted(unconditional.keys() - conditions.keys()),
    }
    if any(missing.values()):
        text = "; ".join(f"the {side} ones lack {', '.join(names)}" for side, names in missing.items() if names)
        raise ValueError(f"guidance pairs conditions by name, but {text}. Give None on both sides for an unused one.")
    unconditional = expand_conditions(unconditional, batch_size)
    return {name: _join(name, value, unconditional[name]) for name, value in conditions.items()}


def _each(name: str, value: Condition, function: Callable[[str, Tensor], Tensor]) -> Condition:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_each(f"{name}[{i}]", item, function) for i, item in enumerate(value)]
    raise TypeError(f"condition {name} is a {type(value).__name__}; it must be a tensor, None or a list of those")


def _join(name: str, conditional: Condition, unconditional: Condition) -> Condition:
    if conditional is None and unconditional is None:
        return None
    if isinstance(conditional, list) and isinstance(unconditional, list) and len(conditional) == len(unconditional):
        pairs = zip(conditional, unconditional, strict=True)
        return [_join(f"{name}[{i}]", *pair) for i, pair in enumerate(pairs)]
    kinds = [_kind(conditional), _kind(unconditional)]
    if kinds[0] != kinds[1] or not isinstance(conditional, Tensor):
        raise ValueError(f"condition {name} is {kinds[0]}, but unconditionally {kinds[1]}: guidance needs a like pair")
    return torch.cat([conditional, unconditional])


def _kind(value: Condition) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a list of {len(value)}"
