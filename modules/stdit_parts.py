"""What the networks of Open-Sora 1.0, 1.1 and 1.2 share: tokens of clips, texts, attention, and the last layer.

Parameter names are those of the published files. Activations are tokens (B, T, S, D): D numbers for each of the S
patches of a frame, row by row.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from modules.blocks import Block, compile_blocks, layer_norm, set_activation_checkpointing
from modules.dit import MAX_PERIOD, Attention, Mlp, TimestepEmbedding, grid_positions, modulate
from modules.sequence import TokenShards


class ClipEmbedding(nn.Module):
    """Latents (B, C, T, H, W) -> tokens (B, T, H, W, D), one for each patch; zeros fill up what ends within one."""

    def __init__(self, patch_size: Sequence[int], in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        (frames, height, width), patch = x.shape[2:], self.proj.kernel_size
        x = F.pad(x, (0, -width % patch[2], 0, -height % patch[1], 0, -frames % patch[0]))
        return self.proj(x).permute(0, 2, 3, 4, 1)


class CaptionEmbedding(nn.Module):
    """Encoded text (B, L, C) -> (B, L, D). `y_embedding` is the empty text: saved, and not trained."""

    def __init__(self, caption_channels: int, hidden_size: int, max_length: int):
        super().__init__()
        self.register_buffer("y_embedding", torch.empty(max_length, caption_channels))
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """dropped: (B,) bool, captions that the empty text replaces."""
        if y.shape[1] > len(self.y_embedding):
            raise ValueError(f"text of {y.shape[1]} tokens: model_max_length is {len(self.y_embedding)}")
        y = y.to(self.y_embedding.dtype)
        if dropped is not None:
            y = torch.where(dropped[:, None, None], self.y_embedding[: y.shape[1]], y)
        return self.y_proj(y)


class Rotation(nn.Module):
    """Rotary positions of frames (arXiv:2104.09864). `freqs` is in the published files and follows from the width."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("freqs", self.frequencies())

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """(width / 2,) float32."""
        return MAX_PERIOD ** -(torch.arange(0, self.width, 2, device=device).float() / self.width)

    def forward(self, frames: int) -> Tensor:
        """(2, T, width / 2) float32: cosines and sines. They stay in float32, whatever the weights are in."""
        device = self.freqs.device
        angles = torch.arange(frames, device=device).float()[:, None] * self.frequencies(device)
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers of (..., T, width) by the angles (2, T, width / 2) of their frame."""
    cos, sin = rotation
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class HeadNorm(nn.RMSNorm):
    """The norm of queries or keys, in their precision, which under autocast is another one than that of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class NormedAttention(Attention):
    """Self-attention of tokens (B, N, D), with norms of queries and keys, and with rotary positions where given."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, rotate_first: bool = False):
        """rotate_first: turn queries and keys before their norms, not after."""
        super().__init__(hidden_size, num_heads)
        self.rotate_first, width = rotate_first, hidden_size // num_heads
        self.q_norm, self.k_norm = (HeadNorm(width, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor | None = None, shards: TokenShards | None = None) -> Tensor:
        """shards: where the N tokens are a part of those that attend to one another."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv if shards is None else shards.whole_of_some_heads(qkv)
        if rotation is None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.rotate_first:
            q, k = self.q_norm(rotate(q, rotation)), self.k_norm(rotate(k, rotation))
        else:
            q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended if shards is None else shards.own_of_all_heads(attended)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens (B, N, D) to text (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (B, L) bool, tokens of the text that count; at least one of each."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None].expand(-1, -1, q.shape[2], -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


def within_frames(attention: nn.Module, x: Tensor, shards: TokenShards | None) -> Tensor:
    """Attention of tokens (B, T, S, D) to those of their frame, of which they may be a part."""
    return attention(x.flatten(0, 1), shards=shards).view_as(x)


def over_frames(attention: nn.Module, x: Tensor, *rotation: Tensor) -> Tensor:
    """Attention of tokens (B, T, S, D) to those at their place in all frames."""
    places = x.transpose(1, 2)  # (B, S, T, D)
    return attention(places.flatten(0, 1), *rotation).view(places.shape).transpose(1, 2)


class TimedFinalLayer(nn.Module):
    """Tokens (B, T, S, D) -> patches (B, T, S, N)."""

    def __init__(self, hidden_size: int, numbers: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, numbers)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: (B, T or 1, D)."""
        shift, scale = (self.scale_shift_table + time[:, :, None])[:, :, None].unbind(3)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raise ValueError where pairs of a head's numbers cannot be rotated, or rows and columns have no equal parts."""
    if hidden_size % (2 * num_heads) or hidden_size % 4:
        raise ValueError(
            f"num_heads: {hidden_size} / {num_heads} is no even width; hidden_size has to be a multiple of 4 "
            "and of twice num_heads"
        )


class ClipTransformer(nn.Module):
    """What the networks have in common beside their blocks: see `STDiT`, `STDiT2` and `STDiT3`."""

    blocks: Sequence[Block]
    """In the order in which tokens pass them."""
    patch_size: tuple[int, int, int]
    """(frames, rows, columns) of latents in a token."""
    hidden_size: int
    out_channels: int
    t_embedder: TimestepEmbedding
    final_layer: TimedFinalLayer
    sequence_group: ProcessGroup | None = None
    """The processes that compute each sample together."""

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as the published training begins with: no attention over time, and no other layer that is new
        beside those of the pictures' network, has an influence."""
        for name, module in self.named_modules():
            self.initialise_layer(name, module)

    @classmethod
    def begins_with_zeros(cls, name: str) -> bool:
        """Whether the weights of a layer, by its name, are zeros at first."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def initialise_layer(cls, name: str, layer: nn.Module) -> None:
        """Give a layer, like that of a name, what `initialise` gives it."""
        for table in ("scale_shift_table", "scale_shift_table_temporal"):
            if isinstance(values := getattr(layer, table, None), nn.Parameter):
                nn.init.normal_(values, std=values.shape[1] ** -0.5)
        if isinstance(layer, CaptionEmbedding):
            nn.init.normal_(layer.y_embedding, std=layer.y_embedding.shape[1] ** -0.5)
        elif isinstance(layer, Rotation):
            layer.freqs.copy_(layer.frequencies())
        elif isinstance(layer, nn.RMSNorm):
            nn.init.ones_(layer.weight)
        if not isinstance(layer, nn.Linear | nn.Conv3d):
            return
        if cls.begins_with_zeros(name):
            nn.init.zeros_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight.flatten(1))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def set_activation_checkpointing(self, level: int) -> None:
        """1: every second block, which in an STDiT3 are the spatial ones; 2 and 3: every block."""
        set_activation_checkpointing(list(self.blocks), level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(list(self.blocks), graphs)

    def split_sequence(self, group: ProcessGroup) -> None:
        """Compute each sample with all processes of a group, which get the same inputs: each a part of the patches of
        every frame. Raises ValueError where they do not divide the attention's heads."""
        heads = self.blocks[0].attn.num_heads
        if heads % group.size():
            raise ValueError(f"{group.size()} processes do not divide the {heads} heads of the attention")
        self.sequence_group = group

    def patches(self, x: Tensor, time: Tensor, *inputs: Tensor | None) -> Tensor:
        """Patches (B, T, S, N) that tokens (B, T, S, D) become by the blocks and the last layer.

        time: (B, T or 1, D) of the last layer. inputs: of every block, beside the tokens.
        """
        shards = self.sequence_group and TokenShards(self.sequence_group, x.shape[2])
        x = shards.own(x) if shards else x
        for block in self.blocks:
            x = block(x, *inputs, shards)
        patches = self.final_layer(x, time)
        return shards.whole(patches) if shards else patches

    def embedded_times(self, t: Tensor, x_mask: Tensor | None) -> Tensor:
        """(B, T or 1, D) of timesteps (B,) or (B, T), which are 0 of frames for which x_mask (B, T) is false."""
        t = t[:, None] if t.dim() == 1 else t
        t = t if x_mask is None else torch.where(x_mask, t, 0)
        return self.t_embedder(t.flatten()).unflatten(0, t.shape)

    def sized_positions(self, grid: Sequence[int], height: Tensor, width: Tensor, input_sq_size: int) -> Tensor:
        """(1, S, D) float32: as many positions as a square of S patches has, in steps by the size in pixels."""
        scale = (height.float() * width.float()).sqrt() / input_sq_size
        base = round(math.sqrt(math.prod(grid)))
        return grid_positions(grid, self.hidden_size, scale.device, [base / side / scale for side in grid])

    def unpatched(self, patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
        """(B, T, S, patch * C), channels fastest -> (B, C, T, H, W), without what was filled up."""
        cut = patches.unflatten(2, grid[1:]).unflatten(-1, (*self.patch_size, self.out_channels))
        latents = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        frames, height, width = size
        return latents[:, :, :frames, :height, :width]
