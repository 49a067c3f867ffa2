"""LoKr of LyCORIS (arXiv:2309.14859): the Kronecker product of a small matrix and a larger one of low rank.

A weight of C_out = O P rows and C_in = I Q columns is changed by scale * (W1 x W2), where W1 (O, I) has the smaller
divisors and W2 (P, Q), or (P, Q, kh, kw), the others. The names and shapes of the factors are LyCORIS's:

    lokr_w1 (O, I), or lokr_w1_a (O, R) @ lokr_w1_b (R, I)
    lokr_w2 (P, Q[, kh, kw]), or lokr_w2_a (P, R) @ lokr_w2_b (R, Q kh kw)
"""

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import LoraSettings, WeightAdapter, is_convolution, matrix, through


def factorised(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller one first.

    One of them is `factor` if that divides the size; else, and with -1, the smaller is the largest divisor that is not
    above the factor and the square root.
    """
    if factor > 0 and size % factor == 0:
        return tuple(sorted((factor, size // factor)))
    limit = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    smaller = next(n for n in range(limit, 0, -1) if size % n == 0)
    return smaller, size // smaller


class LoKr(WeightAdapter):
    """The change scale * (W1 x W2); scale is 1 where neither has a low rank, as in LyCORIS."""

    title = "LoKr"
    factors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    multiplied = ("lokr_w2", "lokr_w2_b")
    rank_is_limited = False  # a matrix that would not become smaller is whole

    def __init__(self, weight: Tensor, settings: LoraSettings):
        super().__init__(weight, settings)
        self.reset_parameters()

    @classmethod
    def shapes(cls, shape: tuple[int, ...], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
        (rows_1, rows_2), (columns_1, columns_2) = (factorised(side, settings.factor) for side in shape[:2])
        rank, kernel = settings.rank, shape[2:]
        found: dict[str, tuple[int, ...]] = {"lokr_w1": (rows_1, columns_1)}
        if settings.decompose_both and not settings.full_matrix and rank < max(rows_1, columns_1) / 2:
            found = {"lokr_w1_a": (rows_1, rank), "lokr_w1_b": (rank, columns_1)}
        if settings.full_matrix or rank >= max(rows_2, columns_2) / 2:
            return found | {"lokr_w2": (rows_2, columns_2, *kernel)}
        return found | {"lokr_w2_a": (rows_2, rank), "lokr_w2_b": (rank, columns_2 * torch.Size(kernel).numel())}

    @staticmethod
    def size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        (rows_1, columns_1), (rows_2, columns_2) = (_size(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return rows_1 * rows_2, columns_1 * columns_2

    @staticmethod
    def rank(tensors: Mapping[str, Tensor]) -> int | None:
        parts = (tensors[name].shape[1] for name in ("lokr_w2_a", "lokr_w1_a") if name in tensors)
        return next(parts, None)

    @staticmethod
    def product(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.kron(_whole(tensors, "lokr_w1"), matrix(_whole(tensors, "lokr_w2")))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, factor in self.tensors.items():
            if name in self.multiplied:
                nn.init.zeros_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=5**0.5)

    @property
    def scale(self) -> float:
        return 1.0 if self.rank(self.tensors) is None else self.settings.scale

    def beside(self, layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
        """(W1 x W2) vec(X) = vec(W1 X W2') for X (I, Q): no matrix of the weight's size is made."""
        tensors = self.tensors
        if is_convolution(layer) and layer.groups > 1:  # a grouped kernel is small, and has no input of its own
            return through(layer, x, (self.scale * self.product(tensors)).view(self.shape).to(x.dtype))
        first = (_whole(tensors, "lokr_w1") * self.scale).to(x.dtype)
        x = x.unflatten(-1, (first.shape[1], -1))  # (B, ..., I, Q)
        if is_convolution(layer):  # for which I is a part of the batch
            changed = self._second(layer, x.movedim(-2, 1).flatten(0, 1)).unflatten(0, (len(x), -1)).movedim(1, -2)
        else:
            changed = self._second(layer, x)
        return F.linear(changed.transpose(-1, -2), first).transpose(-1, -2).flatten(-2)

    def _second(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What W2 makes of x (..., Q)."""
        tensors = {name: factor.to(x.dtype) for name, factor in self.tensors.items()}
        if "lokr_w2" in tensors:
            return through(layer, x, tensors["lokr_w2"])
        kernels = tensors["lokr_w2_b"].unflatten(1, (-1, *self.shape[2:]))
        return F.linear(through(layer, x, kernels), tensors["lokr_w2_a"])


def _size(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    whole, parts = tensors.get(name), [tensors.get(f"{name}_a"), tensors.get(f"{name}_b")]
    if (whole is None) == (None in parts) or (whole is not None and parts != [None, None]):
        raise ValueError(f"it has to hold either {name}, or {name}_a and {name}_b")
    if whole is not None:
        return matrix(whole).shape
    if parts[0].shape[1] != parts[1].shape[0]:
        raise ValueError(f"{name}_a has rank {parts[0].shape[1]} and {name}_b {parts[1].shape[0]}")
    return parts[0].shape[0], matrix(parts[1]).shape[1]


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name].float()
    return tensors[f"{name}_a"].float() @ matrix(tensors[f"{name}_b"].float())
