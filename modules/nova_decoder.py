"""NOVA's diffusion head: from the noised numbers of each token and its condition to what diffusion predicts of them.

Tokens know nothing of each other here. Parameter names and shapes are those of the published files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block, layer_norm
from modules.dit import MAX_PERIOD, TIME_WIDTH, modulate


class PatchTokens(nn.Module):
    """Latents as tokens: (B, C, H, W) -> (B, N, D), row by row; those of clips (B, C, T, H, W) -> (B, T, N, D)."""

    def __init__(self, channels: int, hidden_size: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.dtype)
        if x.dim() == 5:
            pictures = self.proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
            return pictures.unflatten(0, (x.shape[0], x.shape[2]))
        return self.proj(x).flatten(2).transpose(1, 2)

    def of_numbers(self, patches: Tensor) -> Tensor:
        """(..., D) of the numbers (..., patch * patch * C) of single patches, see `patchify`."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Latents (B, C, H, W) -> numbers of patches (B, N, patch * patch * C): rows, columns, channels fastest."""
    cut = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, patch, w, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """What `patchify` made of (B, C, H, W), with `grid` (H / patch, W / patch)."""
    cut = tokens.unflatten(1, grid).unflatten(-1, (patch, patch, -1))  # (B, h, w, patch, patch, C)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Projection(nn.Module):
    """Two layers with SiLU between: (..., `inner`) -> (..., W)."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inner, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class TimeCondition(nn.Module):
    """Conditions (B, N, D) and times -> (B, N, W)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.timestep_proj = Projection(TIME_WIDTH, width)
        self.condition_proj = Projection(hidden_size, width)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """t: (B, N), or (B,) of all tokens of a sample."""
        t = t[:, None] if t.dim() == 1 else t
        sines = time_sines(t).to(self.timestep_proj.fc1.weight.dtype)
        return self.condition_proj(z) + self.timestep_proj(sines)


def time_sines(t: Tensor) -> Tensor:
    """(..., 256) float32 of times (...): cosines, then sines."""
    half = TIME_WIDTH // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device).float() / half)
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Modulation(nn.Module):
    """Tokens with another mean and deviation by their condition, and the other numbers that the layer makes of it."""

    def __init__(self, width: int, made: int):
        super().__init__()
        self.made = made
        self.proj = nn.Linear(width, made * width)
        self.norm = layer_norm(width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        scale, shift, *others = self.proj(F.silu(condition)).chunk(self.made, dim=-1)
        return modulate(self.norm(x), shift, scale), *others


class DecoderBlock(Block):
    """Two layers on a token (B, N, W), modulated and gated by its condition (B, N, W)."""

    wide = True

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = Modulation(width, 3)
        self.proj = Projection(width, width)
        self.norm2 = nn.LayerNorm(width)

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        modulated, gate = self.norm1(x, condition)
        return x + gate * self.norm2(self.proj(modulated))


class DiffusionDecoder(nn.Module):
    """Noised patches (B, N, patch * patch * C) -> predictions of the same shape.

    Args:
        hidden_size: D of the conditions. depth, width: of the blocks.
    """

    def __init__(self, channels: int, patch: int, hidden_size: int, depth: int, width: int):
        super().__init__()
        self.patch_embed = PatchTokens(channels, width, patch)
        self.time_cond_embed = TimeCondition(hidden_size, width)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(depth))
        self.norm = Modulation(width, 2)
        self.head = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """t: times from 0 to 1,000, (B, N), or (B,) of all tokens of a sample; z: conditions (B, N, D)."""
        condition = self.time_cond_embed(t, z)
        x = self.patch_embed.of_numbers(x)
        for block in self.blocks:
            x = block(x, condition)
        (x,) = self.norm(x, condition)
        return self.head(x)
