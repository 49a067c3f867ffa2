"""What adapters of a weight have in common, whichever kind they are: settings, the place beside a layer, and merging.

A kind of adapter is one class in a file of its own (`modules.low_rank`, `modules.lokr`, `modules.loha`). It says what
its factors are called, what they make of each other, and how it is computed beside its layer. Adapters are float32,
whatever the weights are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import PointwiseConv

Kind = Literal["lora", "lokr", "loha"]


@dataclass(frozen=True)
class LoraSettings:
    """What adapters are like."""

    rank: int
    """R: a LoRA of a weight (C_out, C_in) has R * (C_out + C_in) parameters."""
    alpha: float
    """The change counts alpha / R."""
    rank_stabilised: bool = False
    """It counts alpha / sqrt(R) instead, so that a higher rank does not learn more slowly (arXiv:2312.03732)."""
    dropout: float = 0.0
    """On what goes into the adapters, while training."""
    dora: bool = False
    """Also learn the length of each row of the changed weight (arXiv:2402.09353); LoRA alone."""
    split_qkv: bool = False
    """Three adapters for queries, keys and values of an attention layer, instead of one for the fused matrix."""
    init: Literal["zero_up", "published"] = "zero_up"
    """Both start without any change: up = 0 and down uniform, or as published down = 0 and up normal; LoRA alone."""
    kind: Kind = "lora"
    """Which class of adapter."""
    factor: int = -1
    """Of LoKr: see `modules.lokr.factorised`."""
    decompose_both: bool = False
    """Of LoKr: the smaller matrix has a low rank, too, where that makes it smaller."""
    full_matrix: bool = False
    """Of LoKr: neither matrix has a low rank."""
    min_rank: int | None = None
    """The rank at pure noise, from which it rises to `rank`, see `modules.rank_by_noise`; of LoRA without DoRA."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def parts_apart(self) -> bool:
        """Whether queries, keys and values get an adapter each: a product of LoKr or LoHa has no thirds."""
        return self.split_qkv or self.kind != "lora"


class WeightAdapter(nn.Module):
    """The change of a weight (C_out, C_in), or (C_out, C_in / groups, kh, kw) of a convolution: scale * product."""

    title: ClassVar[str]
    """What people call the kind."""
    factors: ClassVar[tuple[str, ...]]
    """The names of its parameters, in our files too; not every adapter has all of them."""
    multiplied: ClassVar[tuple[str, ...]]
    """Factors that the product is linear in: an adapter has exactly one of them."""
    rank_is_limited: ClassVar[bool] = True
    """Whether a rank above that of the weight is an error."""

    def __init__(self, weight: Tensor, settings: LoraSettings):
        super().__init__()
        self.settings = settings
        self.active = True
        self.unmerged: Tensor | None = None  # what `merge` has changed
        self.magnitude: nn.Parameter | None = None  # of DoRA
        self.shape = tuple(weight.shape)
        device = None if weight.is_meta else weight.device  # a weight may wait for its values; adapters do not
        for name, shape in self.shapes(self.shape, settings).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))

    @classmethod
    def shapes(cls, shape: tuple[int, ...], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors of an adapter of a weight of this shape."""
        raise NotImplementedError

    @staticmethod
    def size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The rows and columns of the product of some factors. Raises ValueError where they do not go together."""
        raise NotImplementedError

    @staticmethod
    def rank(tensors: Mapping[str, Tensor]) -> int | None:
        """What alpha is divided by; None where the product counts as it is."""
        raise NotImplementedError

    @staticmethod
    def product(tensors: Mapping[str, Tensor]) -> Tensor:
        """What the factors make: (C_out, everything else), in float32."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start without a change."""
        raise NotImplementedError

    def beside(self, layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
        """The change of the output (..., C_out) of a layer that takes x (..., C_in), channels last."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The factors by name."""
        return {name: self._parameters[name] for name in self.factors if name in self._parameters}

    @property
    def scale(self) -> float:
        """What the product counts."""
        return self.settings.scale

    def forward(
        self,
        x: Tensor,
        output: Tensor,
        layer: nn.Module,
        weight: Tensor | None,
        bias: Tensor | None,
        rows=slice(None),
    ) -> Tensor:
        """The output (..., C_out) of a layer, changed.

        Args:
            x, output: what the layer took and gave, channels last.
            weight, bias: of the layer, or those rows of them that made the output. Only DoRA looks at the weight.
            rows: the part of the adapter that belongs to them.
        """
        if not self.active or self.unmerged is not None:
            return output
        x = F.dropout(x, self.settings.dropout, self.training)
        return self.changed(output, self.beside(layer, x, rows), weight, bias, rows)

    def changed(
        self, output: Tensor, change: Tensor, weight: Tensor | None, bias: Tensor | None, rows: slice
    ) -> Tensor:
        """The output with its change; DoRA scales both."""
        return output + change

    @torch.no_grad()
    def change(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight`, in its shape and in float32."""
        return change_of(weight, self.scale * self.product(self.tensors), self.magnitude)


def change_of(weight: Tensor, product: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """What an adapter adds to a weight, in its shape and in float32.

    Args:
        product: (C_out, everything else), scaled.
        magnitude: of DoRA, the length of each row (C_out,) or column (1, C_in) of the changed weight.
    """
    changed = weight.float() + product.view(weight.shape)
    if magnitude is not None:
        kept = magnitude.dim() - 1  # the dimension of the weight whose every entry has a length
        dims = [dim for dim in range(weight.dim()) if dim != kept]
        lengths = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
        changed *= magnitude.view(lengths.shape) / lengths
    return changed - weight.float()


def matrix(weight: Tensor) -> Tensor:
    """(C_out, everything else)."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer has a kernel of pixels; one of 1 x 1 with channels last is a matrix."""
    return isinstance(layer, nn.Conv2d) and not isinstance(layer, PointwiseConv)


def through(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer would make of x (..., C_in), channels last, by another weight and without a bias."""
    if not is_convolution(layer):
        return F.linear(x, matrix(weight))
    return layer._conv_forward(x.permute(0, 3, 1, 2), weight, None).permute(0, 2, 3, 1)
