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
        self.kept: Tensor | None = None  # (B, R) bool, by `modules.rank_by_noise`
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
        kept = self._kept_for(x)
        if is_convolution(layer) and layer.groups > 1:  # a grouped kernel is small, and no product of smaller ones
            if kept is None:
                return through(layer, x, (up @ matrix(down)).view(layer.weight.shape))
            kernels = ((up * kept[:, None]) @ matrix(down)).unflatten(2, layer.weight.shape[1:])
            return torch.cat([through(layer, one, own) for one, own in zip(x.split(1), kernels, strict=True)])
        hidden = through(layer, x, down)
        return F.linear(hidden if kept is None else hidden * kept.view(len(x), *[1] * (x.dim() - 2), -1), up)

    def _kept_for(self, x: Tensor) -> Tensor | None:
        """(N, R) in the dtype of x (N, ..., C): 1 for what a row keeps of the rank, 0 for the rest. Rows are samples,
        or parts of them, those of a sample together. None: all keep all."""
        if self.settings.min_rank is None:
            return None
        if self.kept is None:
            raise RuntimeError("the rank follows the noise, which nothing has said: call `follow_noise` first")
        if len(x) % len(self.kept):
            raise ValueError(
                f"min_rank: a layer of {self.shape} works on all samples at once, so that it has no rank for each: "
                "leave it out of module_filters, or remove min_rank"
            )
        return self.kept.to(x.dtype).repeat_interleave(len(x) // len(self.kept), dim=0)

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
