"""Frozen weights in eight bits that compute in eight bits: whole numbers from -127 to 127, weights and activations.

A weight has a scale for each row, what goes into a layer one for each token, and so have the gradients that come back
through it: all products are of int8 numbers, summed in int32 (LLM.int8(), arXiv:2208.07339, without its exceptions).
With a rotation, blocks of channels are multiplied with a Hadamard matrix before they are rounded, weights and
activations alike, which changes no exact product and spreads a channel that is far larger than the rest over its block
(QuaRot, arXiv:2404.00456).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.packed import PackedLinear, keep_packed, unpacked

LARGEST = 127
MIXED_CHANNELS = 256
"""That a rotation mixes, or the largest power of two below that divides a layer's."""
SIDES = 8
"""cuBLAS multiplies int8 matrices whose sides this number divides."""
FEWEST_ROWS = 17
"""The smallest number of rows of the first matrix that cuBLAS takes."""


class Int8Linear(PackedLinear):
    """A frozen linear layer with its weight in int8, which multiplies in int8, too."""

    rotates = False

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), unpacked and rotated back; changing it changes nothing."""
        weight = unpacked(self.stored, self.scale)
        return rotated(weight) if self.rotates else weight

    @classmethod
    def takes(cls, weight: Tensor) -> bool:
        """Whether a matrix (C_out, C_in) can be packed."""
        return all(side % SIDES == 0 for side in weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out), in the precision of `scale`."""
        x = x.to(self.scale.dtype)
        with without_autocast(x.device):
            return _Product.apply(rotated(x) if self.rotates else x, self.stored, self.scale, self.bias)


class RotatedInt8Linear(Int8Linear):
    """The same, of channels that a rotation has mixed."""

    rotates = True


class _Product(torch.autograd.Function):
    """x W' + bias, both ways of whole numbers; nothing of x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        numbers, each = rounded(x.flatten(0, -2))
        product = torch.mul(product_of(numbers, stored.t()), each[:, None]).mul_(scale)
        return (product if bias is None else product.add_(bias)).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        stored, scale = ctx.saved_tensors
        with without_autocast(grad.device):
            numbers, each = rounded(grad.flatten(0, -2) * scale)
            # The layout in which cuBLAS reads the second matrix.
            columns = stored.t().contiguous().t() if grad.is_cuda else stored
            product = torch.mul(product_of(numbers, columns), each[:, None])
        return product.to(scale.dtype).view(*grad.shape[:-1], -1), None, None, None


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, C) as int8 numbers (N, C) and a float32 scale for each (N,): the largest of a row becomes 127."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (rows / scale[:, None]).round_().to(torch.int8), scale


def product_of(numbers: Tensor, others: Tensor) -> Tensor:
    """Of int8 matrices (N, C) and (C, M): int32 (N, M)."""
    missing = FEWEST_ROWS - len(numbers)
    if missing <= 0:
        return torch._int_mm(numbers, others)
    return torch._int_mm(F.pad(numbers, (0, 0, 0, missing)), others)[: len(numbers)]


def rotated(x: Tensor) -> Tensor:
    """x (..., C) with its channels mixed, in blocks, by a Hadamard matrix; rotated twice, it is x."""
    block = min(MIXED_CHANNELS, x.shape[-1] & -x.shape[-1])
    return (x.unflatten(-1, (-1, block)) @ _mixing(block, x.dtype, x.device)).flatten(-2)


@torch.compiler.assume_constant_result
def _mixing(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant of compiled code, too, which would otherwise make it on the CPU in each call."""
    return _hadamard(side, dtype, device)


@lru_cache
def _hadamard(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix (side, side), orthonormal and symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (matrix / side**0.5).to(device, dtype)


def keep_in_int8(network: nn.Module, device: torch.device | str, *, rotate: bool = False) -> None:
    """Put the matrices of linear layers into int8, one by one on `device`, frozen.

    Others, and matrices with a side that eight does not divide, stay as they are.
    """

    def pack(rows: Tensor, computes_in: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = rotated(rows) if rotate else rows
        _, scale = rounded(rows)
        scale = scale.to(computes_in)  # rounded before the numbers are, so that it adds no error
        return (rows / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale

    keep_packed(network, RotatedInt8Linear if rotate else Int8Linear, pack, device)
