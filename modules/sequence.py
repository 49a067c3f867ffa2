"""Sequence parallelism: several processes compute one sample together, each a part of its tokens.

Attention wants all tokens of some heads where everything else wants all heads of some tokens: an all-to-all leads from
one to the other and back (DeepSpeed-Ulysses, arXiv:2309.14509). Tokens that the processes do not divide are filled up
with zeros, which no attention sees.

Gradients follow the engine's rule that parameters have the mean over all processes: `TokenShards.whole` multiplies
the gradient by the number of processes, so that the mean of their parts is the sum.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenShards:
    """The part of this process of `length` tokens, which the processes of a group share."""

    group: dist.ProcessGroup
    length: int

    @property
    def count(self) -> int:
        """Of the processes."""
        return self.group.size()

    @property
    def _missing(self) -> int:
        return -self.length % self.count

    def own(self, x: Tensor) -> Tensor:
        """Whole tokens (..., N, D), the same on all processes -> those of this process (..., n, D)."""
        return F.pad(x, (0, 0, 0, self._missing)).chunk(self.count, dim=-2)[self.group.rank()]

    def whole(self, x: Tensor) -> Tensor:
        """The tokens (..., n, D) of this process -> those of all (..., N, D), on all processes."""
        return _Gather.apply(x, self.group)[..., : self.length, :]

    def whole_of_some_heads(self, x: Tensor) -> Tensor:
        """All heads of own tokens (..., heads, n, d) -> all tokens of own heads (..., heads / count, N, d)."""
        return _Exchange.apply(x, self.group, -3, -2)[..., : self.length, :]

    def own_of_all_heads(self, x: Tensor) -> Tensor:
        """The way back: (..., heads / count, N, d) -> (..., heads, n, d)."""
        return _Exchange.apply(F.pad(x, (0, 0, 0, self._missing)), self.group, -2, -3)


class _Gather(torch.autograd.Function):
    """(..., n, D) of every process -> (..., count * n, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        count = ctx.group.size()
        return grad.chunk(count, dim=-2)[ctx.group.rank()] * count, None


class _Exchange(torch.autograd.Function):
    """Cut one dimension into as many parts as there are processes, give each its part, and put what comes from them
    together along another."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, cut: int, joined: int) -> Tensor:
        ctx.group, ctx.cut, ctx.joined = group, cut, joined
        return _exchanged(x, group, cut, joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.group, ctx.joined, ctx.cut), None, None, None


def _exchanged(x: Tensor, group: dist.ProcessGroup, cut: int, joined: int) -> Tensor:
    sent = torch.stack(x.chunk(group.size(), dim=cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=joined)
