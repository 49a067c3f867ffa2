"""Frozen weights in eight bits that compute in eight bits: float8 numbers, weights and activations.

A weight is kept as `modules.float8` keeps it, with a scale for each row. What goes into a layer is rounded with a
scale for each token, and so are the gradients that come back through it; products are of float8 numbers, summed in
float32 (as torchao's training in float8 with row-wise scales). All numbers are e4m3 (arXiv:2209.05433): where each row
has its scale, gradients need its precision more than the range of e5m2.
"""

import torch
from torch import Tensor

from modules.autocast import without_autocast
from modules.float8 import Float8Linear

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SIDES = 16
"""GPUs multiply float8 matrices whose sides this number divides."""
CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in float8: Ada, then Hopper."""


class Float8ProductLinear(Float8Linear):
    """A frozen linear layer with its weight in float8, which multiplies in float8, too."""

    @classmethod
    def takes(cls, weight: Tensor) -> bool:
        """Whether a matrix (C_out, C_in) can be packed."""
        return all(side % SIDES == 0 for side in weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out), in the precision of `scale`."""
        with without_autocast(x.device):
            return _Product.apply(x.to(self.scale.dtype), self.stored, self.scale, self.bias)


class _Product(torch.autograd.Function):
    """x W' + bias, both ways of float8 numbers; nothing of x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        numbers, each = rounded(x.flatten(0, -2))
        product = product_of(numbers, stored.t(), each, scale.float()).to(x.dtype)
        return (product if bias is None else product.add_(bias)).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        stored, scale = ctx.saved_tensors
        with without_autocast(grad.device):
            numbers, each = rounded(grad.flatten(0, -2) * scale)
            columns = stored.t().contiguous().t()  # the layout in which GPUs read the second matrix
            product = product_of(numbers, columns, each, torch.ones_like(columns[0], dtype=torch.float32))
        return product.to(scale.dtype).view(*grad.shape[:-1], -1), None, None, None


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, C) as float8 numbers (N, C) and a float32 scale for each (N,): the largest of a row becomes 448."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (rows / scale[:, None]).clamp(-LARGEST, LARGEST).to(DTYPE), scale


def product_of(numbers: Tensor, others: Tensor, each: Tensor, of_others: Tensor) -> Tensor:
    """Of float8 matrices (N, C), whose rows have scales (N,), and (C, M), whose columns have (M,): bfloat16 (N, M),
    which all GPUs give."""
    return torch._scaled_mm(numbers, others, each[:, None], of_others[None], out_dtype=torch.bfloat16)
