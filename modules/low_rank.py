"""LoRA (arXiv:2106.09685), and DoRA (arXiv:2402.09353): the product of two matrices of low rank."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import LoraSettings, WeightAdapter, is_convolution, matrix, through


class LowRank(WeightAdapter):
    """The change scale * up @ down.

    Parameters: `down` (R, C_in) or (R, C_in / groups, kh, kw), `up` (C_out, R), and with DoRA `magnitude` (C_out,).
    """

    title = "LoRA"
    factors = ("down", "up")
    multiplied = ("up",)

    def __init__(self, weight: Tensor, settings: LoraSettings):
        super().__init__(weight, settings)
        if settings.dora:
            squared_norms = matrix(weight.detach().to(torch.float32)).square().sum(dim=1)
            self.register_buffer("squared_norms", squared_norms, persistent=False)
            self.magnitude = nn.Parameter(squared_norms.sqrt())
        self.reset_parameters()

    @classmethod
    def shapes(cls, shape: tuple[int, ...], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
        return {"down": (settings.rank, *shape[1:]), "up": (shape[0], settings.rank)}

    @staticmethod
    def size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        return tensors["up"].shape[0], matrix(tensors["down"]).shape[1]

    @staticmethod
    def rank(tensors: Mapping[str, Tensor]) -> int:
        return tensors["up"].shape[1]

    @staticmethod
    def product(tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["up"].float() @ matrix(tensors["down"].float())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.settings.init == "published":
            nn.init.normal_(self.up)
            nn.init.zeros_(self.down)
        else:
            nn.init.zeros_(self.up)
            bound = self.down[0].numel() ** -0.5
            nn.init.uniform_(self.down, -bound, bound)

    def beside(self, layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
        """Neither the change of a weight nor its gradient is ever made at full size."""
        down, up = self.down.to(x.dtype), (self.up[rows] * self.scale).to(x.dtype)
        if is_convolution(layer) and layer.groups > 1:  # a grouped kernel is small, and no product of smaller ones
            return through(layer, x, (up @ matrix(down)).view(layer.weight.shape))
        return F.linear(through(layer, x, down), up)

    def changed(
        self, output: Tensor, change: Tensor, weight: Tensor | None, bias: Tensor | None, rows: slice
    ) -> Tensor:
        if self.magnitude is None:
            return output + change
        longer = (self.magnitude[rows] / self._norms(weight, rows) - 1).to(output.dtype)
        plain = output if bias is None else output - bias
        return output + change + longer * (plain + change)

    @torch.no_grad()
    def _norms(self, weight: Tensor, rows=slice(None)) -> Tensor:
        """The length (C_out,) of each row of the changed weight; a constant to the gradient (DoRA, section 4.3).

        |w + s u D|^2 = |w|^2 + 2 s u . (D w) + s^2 u D D' u', which needs no matrix of the weight's size.
        """
        down, up = matrix(self.down), self.up[rows]
        mixed = F.linear(down.to(weight.dtype), matrix(weight)).float().T
        own = up @ (down @ down.T)
        squares = self.squared_norms[rows] + 2 * self.scale * (up * mixed).sum(1) + self.scale**2 * (up * own).sum(1)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
