"""Frozen weights in eight bits: the matrices of linear layers as float8 numbers, and a scale for each row.

`float8_e4m3fn` has 3 bits of mantissa and reaches 448, `float8_e5m2` has 2 and reaches 57344 (arXiv:2209.05433). The
scales are powers of two, so that they round nothing. Only storage is float8: layers compute in the dtype that their
weights had, and adapters learn through them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.packed import PackedLinear, keep_packed, unpacked

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""By name."""


class Float8Linear(PackedLinear):
    """A frozen linear layer with its weight in float8."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out), in the precision of `scale`."""
        return _Product.apply(x.to(self.scale.dtype), self.stored, self.scale, self.bias)


class _Product(torch.autograd.Function):
    """x W' + bias; the backward pass keeps the eight bits, and unpacks them again."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        with without_autocast(x.device):
            return F.linear(x, unpacked(stored, scale), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        stored, scale = ctx.saved_tensors
        return grad.to(scale.dtype) @ unpacked(stored, scale), None, None, None


def keep_in_float8(
    network: nn.Module, dtype: torch.dtype, device: torch.device | str, kind: type[Float8Linear] = Float8Linear
) -> None:
    """Put the matrices of linear layers into float8, one by one on `device`, frozen; others stay as they are.

    Args:
        dtype: one of FORMATS.
        kind: what the layers become, see `modules.float8_product` for another.
    """
    limit = torch.finfo(dtype).max

    def pack(rows: Tensor, computes_in: torch.dtype) -> tuple[Tensor, Tensor]:
        # largest / limit = m 2^e with 1/2 <= m < 1: divided by 2^e, a row's largest number is within the last octave.
        exponents = torch.frexp(rows.abs().amax(dim=1) / limit).exponent
        scale = torch.ldexp(torch.ones_like(rows[:, 0]), exponents)
        return (rows / scale[:, None]).to(dtype), scale.to(computes_in)

    keep_packed(network, kind, pack, device)
