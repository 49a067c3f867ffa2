"""LoHa of LyCORIS (FedPara, arXiv:2108.06098): the elementwise product of two products of low rank.

The change is scale * (W1a @ W1b) * (W2a @ W2b), whose rank reaches R^2 with the parameters of two LoRAs of rank R. The
names and shapes of the factors are LyCORIS's: `hada_w1_a` and `hada_w2_a` (C_out, R), `hada_w1_b` and `hada_w2_b` (R,
everything else).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import LoraSettings, WeightAdapter, is_convolution, through


class LoHa(WeightAdapter):
    """The change scale * (W1a @ W1b) * (W2a @ W2b)."""

    title = "LoHa"
    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    multiplied = ("hada_w2_a",)

    def __init__(self, weight: Tensor, settings: LoraSettings):
        super().__init__(weight, settings)
        self.reset_parameters()

    @classmethod
    def shapes(cls, shape: tuple[int, ...], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
        a, b = (shape[0], settings.rank), (settings.rank, torch.Size(shape[1:]).numel())
        return dict(zip(cls.factors, (a, b, a, b), strict=True))

    @staticmethod
    def size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        if lacking := [name for name in LoHa.factors if name not in tensors]:
            raise ValueError(f"it has no {lacking[0]}: the file is not whole")
        ranks = {*(tensors[f"hada_w{i}_a"].shape[1] for i in "12"), *(len(tensors[f"hada_w{i}_b"]) for i in "12")}
        sizes = {(len(tensors[f"hada_w{i}_a"]), tensors[f"hada_w{i}_b"].flatten(1).shape[1]) for i in "12"}
        if len(ranks) > 1 or len(sizes) > 1:
            raise ValueError("its four matrices do not go together")
        return sizes.pop()

    @staticmethod
    def rank(tensors: Mapping[str, Tensor]) -> int:
        return tensors["hada_w1_a"].shape[1]

    @staticmethod
    def product(tensors: Mapping[str, Tensor]) -> Tensor:
        halves = (tensors[f"hada_w{i}_a"].float() @ tensors[f"hada_w{i}_b"].float() for i in "12")
        return next(halves) * next(halves)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As LyCORIS does it."""
        nn.init.normal_(self.hada_w1_a, std=0.1)
        nn.init.normal_(self.hada_w1_b)
        nn.init.zeros_(self.hada_w2_a)
        nn.init.normal_(self.hada_w2_b)

    def beside(self, layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
        """The change as the LoRA of rank R^2 that it is: with row-wise products of the factors for its two matrices.

        Where R^2 is more than the weight has, the change itself is smaller, and is made at full size.
        """
        rank, columns = self.hada_w1_b.shape
        if rank**2 > min(self.shape[0], columns) or (is_convolution(layer) and layer.groups > 1):
            return through(layer, x, (self.scale * self.product(self.tensors)).view(self.shape).to(x.dtype))
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None] * self.scale).flatten(1).to(x.dtype)
        down = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).view(rank**2, *self.shape[1:]).to(x.dtype)
        return F.linear(through(layer, x, down), up)
