"""The blocks that the networks of the cascade are made of, on channels-last activations (B, H, W, C).

Parameter names and shapes are those of the official checkpoints. Inside a block nothing is permuted in memory: linear
layers and norms work on the last axis, and the one operation that wants (B, C, H, W), the depthwise convolution, gets
a view with channels-last strides and returns one.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.feed_forward import FeedForward


def layer_norm(c: int) -> nn.LayerNorm:
    """The norm used everywhere in the cascade: over the channels of each position, without parameters."""
    return nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, H, W, C) to `size` (H, W), corners aligned. The same size returns x itself."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    resized = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=True)
    return resized.permute(0, 2, 3, 1)


def time_embedding(r: Tensor, width: int, max_period: int = 10000) -> Tensor:
    """Sines, then cosines, of r * max_period at geometrically spaced frequencies.

    r: (B,), usually in [0, 1]. Returns (B, width) in float32 at least; an odd width ends with a zero. The sines are of
    numbers up to max_period, so float32 rounding is up to 5e-4 and the order of operations is part of the definition.
    """
    half = width // 2
    r = r.to(torch.promote_types(r.dtype, torch.float32)) * max_period
    frequencies = torch.arange(half, device=r.device).float().mul(-math.log(max_period) / (half - 1)).exp()
    angles = r[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width - 2 * half))


class Conv(nn.Conv2d):
    """PyTorch's convolution on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TransposedConv(nn.ConvTranspose2d):
    """PyTorch's transposed convolution on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution on (B, H, W, C): the arithmetic of a linear layer, the weight shape (C_out, C_in, 1, 1)."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class DepthwiseConv(Conv):
    """A convolution of each channel with its own kernel on (B, H, W, C), same size out."""

    def __init__(self, c: int, kernel_size: int, padding_mode: str = "zeros"):
        super().__init__(c, c, kernel_size, padding=kernel_size // 2, groups=c, padding_mode=padding_mode)


class MultiheadAttention(nn.Module):
    """Attention of query (B, N, C) to memory (B, M, C) -> (B, N, C), with the names of `nn.MultiheadAttention`."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0):
        super().__init__()
        if c % nhead:
            raise ValueError(f"{nhead} attention heads do not divide {c} channels: nhead must be a divisor of {c}")
        self.nhead, self.dropout = nhead, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * c))
        self.out_proj = nn.Linear(c, c)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        c = query.shape[-1]
        weight_q, weight_kv = self.in_proj_weight.split((c, 2 * c))
        bias_q, bias_kv = self.in_proj_bias.split((c, 2 * c))
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(memory, weight_kv, bias_kv).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """What all blocks share: activation checkpointing that leaves names and hooks alone.

    Subclasses write `compute`. All blocks of one network are called with the same inputs; in the denoisers these are
    `block(x, skip, time, tokens)` with x (B, H, W, C), skip (B, H, W, C_skip) or None, time (B, C_time) and tokens
    (B, L, D), and each block reads the ones it needs. With `checkpointed` set, the activations inside are computed
    again in the backward pass instead of being kept. `wide` blocks hold most of them.
    """

    checkpointed = False
    wide = False

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)

    def compute(self, *inputs: Tensor | None) -> Tensor:
        raise NotImplementedError


class ResBlock(Block):
    """Depthwise convolution, then the wide layer pair, which also sees the skip where `c_skip` is not 0."""

    wide = True

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = DepthwiseConv(c, kernel_size)
        self.norm = layer_norm(c)
        self.channelwise = FeedForward(c + c_skip, c, dropout)

    def compute(self, x: Tensor, skip: Tensor | None, time: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x))
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=-1)
        return x + self.channelwise(hidden)


class FeedForwardBlock(Block):
    """The wide layer pair alone."""

    wide = True

    def __init__(self, c: int, dropout: float = 0.0):
        super().__init__()
        self.norm = layer_norm(c)
        self.channelwise = FeedForward(c, c, dropout)

    def compute(self, x: Tensor, skip: Tensor | None, time: Tensor, tokens: Tensor) -> Tensor:
        return x + self.channelwise(self.norm(x))


class TimestepBlock(Block):
    """Scales and shifts channels by the time embedding and by those of the other time conditions.

    `time` is (B, c_timestep * (1 + len(conds))): the embedding of the timestep, then one per name in `conds`.
    """

    def __init__(self, c: int, c_timestep: int, conds: tuple[str, ...] = ("sca",)):
        super().__init__()
        self.names = ["mapper", *(f"mapper_{name}" for name in conds)]
        for name in self.names:
            self.add_module(name, nn.Linear(c_timestep, c * 2))

    def compute(self, x: Tensor, skip: Tensor | None, time: Tensor, tokens: Tensor) -> Tensor:
        parts = time.chunk(len(self.names), dim=1)
        both = sum(getattr(self, name)(part) for name, part in zip(self.names, parts, strict=True))
        scale, shift = both[:, None, None, :].chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention2D(nn.Module):
    """Attention of the positions of (B, H, W, C) to tokens (B, L, C), and with `self_attn` to each other."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0):
        super().__init__()
        self.attn = MultiheadAttention(c, nhead, dropout)

    def forward(self, x: Tensor, tokens: Tensor, self_attn: bool) -> Tensor:
        positions = x.flatten(1, 2)
        memory = torch.cat([positions, tokens], dim=1) if self_attn else tokens
        return self.attn(positions, memory).view_as(x)


class AttnBlock(Block):
    """Attention to the conditions (B, L, c_cond) and, with `self_attn`, to the picture itself."""

    def __init__(self, c: int, c_cond: int, nhead: int, self_attn: bool = True, dropout: float = 0.0):
        super().__init__()
        self.self_attn = self_attn
        self.norm = layer_norm(c)
        self.attention = Attention2D(c, nhead, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def compute(self, x: Tensor, skip: Tensor | None, time: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.attention(hidden, self.kv_mapper(tokens), self.self_attn)


class Rescale(nn.Module):
    """Bilinear resizing of (B, H, W, C) by a factor, sizes floored, corners aligned."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return resize(x, (math.floor(x.shape[1] * self.factor), math.floor(x.shape[2] * self.factor)))


class UpDownBlock2d(nn.Module):
    """Change of width between levels and, where `enabled`, of size: halved after it (down), doubled before it (up)."""

    def __init__(self, c_in: int, c_out: int, mode: str, enabled: bool = True):
        super().__init__()
        assert mode in ("up", "down")
        rescale = Rescale(2 if mode == "up" else 0.5) if enabled else nn.Identity()
        mapping = PointwiseConv(c_in, c_out)
        self.blocks = nn.Sequential(*([rescale, mapping] if mode == "up" else [mapping, rescale]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def set_activation_checkpointing(blocks: list[Block], level: int) -> None:
    """Choose which blocks compute their activations again in the backward pass instead of keeping them.

    0: none. 1: every second of the `wide` blocks, which hold most of the memory. 2: all of those. 3: every block.
    Gradients are the same at every level. Raises ValueError for another level.
    """
    if level not in (0, 1, 2, 3):
        raise ValueError(f"activation checkpointing level {level!r} does not exist: choose 0 (off), 1, 2 or 3 (all)")
    wide = [block for block in blocks if block.wide]
    chosen = ([], wide[::2], wide, blocks)[level]
    for block in blocks:
        block.checkpointed = False
    for block in chosen:
        block.checkpointed = True


def compile_blocks(blocks: list[Block], graphs: bool = False) -> None:
    """Let `torch.compile` fuse what each block computes; checkpointing, hooks and names stay outside of it.

    graphs: with gradients, replay it as CUDA graphs, one for each shape of inputs. Who calls has to mark where a step
    begins (`torch.compiler.cudagraph_mark_step_begin`), since outputs are written over in the next.
    """
    for block in blocks:
        fused = torch.compile(block.compute)
        block.compute = _graphs_in_training(block.compute, fused) if graphs else fused


def _graphs_in_training(compute: Callable[..., Tensor], fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`compute` as CUDA graphs while gradients are wanted, else `fused`: sampling keeps what an earlier step gave."""
    recorded = torch.compile(compute, mode="reduce-overhead", dynamic=False)

    @wraps(compute)
    def call(*inputs: Tensor | None, **named: Tensor | None) -> Tensor:
        return (recorded if torch.is_grad_enabled() else fused)(*inputs, **named)

    return call
