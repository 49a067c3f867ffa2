"""STDiT, the network of Open-Sora 1.0, and PixArt-alpha, which is the same without attention over time, as a function
of published weights: for the golden drawings of diffusion with learned variances."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import weights_of

HEADS, PATCH = 4, 2


def sines(places: Tensor, width: int) -> Tensor:
    angles = places[:, None].double() * 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SmallSTDiT:
    """Latents (B, C, T, H, W) -> predictions (B, 2 C, T, H, W)."""

    def __init__(self, spec: dict):
        made = spec["constructor"]
        frames, height, width = (side // (1, PATCH, PATCH)[i] for i, side in enumerate(made["input_size"]))
        size, scale = made["hidden_size"], made["space_scale"]
        rows, columns = (sines(torch.arange(side) / scale, size // 2) for side in (height, width))
        positions = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, 0)], dim=1)
        over_time = sines(torch.arange(frames) / made.get("time_scale", 1.0), size)
        tables = {"pos_embed": positions[None].float(), "pos_embed_temporal": over_time[None].float()}
        self.weights = weights_of(spec, {}, computed=tables)
        self.depth = made["depth"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.linear(f"{name}.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def cross_attention(self, name: str, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        q = self.linear(f"{name}.q_linear", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.linear(f"{name}.kv_linear", y).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.linear(f"{name}.proj", found.transpose(1, 2).flatten(2))

    def embedded_time(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(128).float() / 128)
        embedded = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        return self.linear("t_embedder.mlp.2", F.silu(embedded))

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, noised: Tensor | None = None) -> Tensor:
        """y (B, 1, L, D) and its `mask` (B, L); `noised` (B, T) is false for frames that are given."""
        weights, (batch, channels, frames, height, width) = self.weights, x.shape
        tokens = F.conv3d(
            x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=(1, PATCH, PATCH)
        )
        tokens = tokens.flatten(3).permute(0, 2, 3, 1) + weights["pos_embed"]  # (B, T, S, D)
        y, mask = self.mlp("y_embedder.y_proj", y[:, 0]), mask.bool()
        noised = torch.ones(batch, frames, dtype=torch.bool) if noised is None else noised

        def modulation(table: Tensor, times: list[Tensor]) -> list[Tensor]:
            """(B, T, 1, D) each, of noised and of given frames."""
            now, clean = (table + time.view(batch, *table.shape) for time in times)
            chosen = torch.where(noised[:, :, None, None], now[:, None], clean[:, None])
            return list(chosen[:, :, :, None].unbind(2))

        times = [self.embedded_time(t), self.embedded_time(torch.zeros_like(t))]
        in_blocks = [self.linear("t_block.1", F.silu(time)) for time in times]
        for i in range(self.depth):
            name = f"blocks.{i}"
            table = weights[f"{name}.scale_shift_table"]
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(table, in_blocks)
            found = self.attention(f"{name}.attn", norm(tokens, shift, scale).flatten(0, 1)).view_as(tokens)
            tokens = tokens + gate * found
            if f"{name}.attn_temp.qkv.weight" in weights:
                moved = tokens.transpose(1, 2)  # (B, S, T, D)
                moved = moved + weights["pos_embed_temporal"] if i == 0 else moved
                found = self.attention(f"{name}.attn_temp", moved.flatten(0, 1)).view_as(moved)
                unmasked = (table[2] + in_blocks[0].view(batch, 6, -1)[:, 2])[:, None, None]
                tokens = tokens + unmasked * found.transpose(1, 2)
            told = self.cross_attention(f"{name}.cross_attn", tokens.flatten(1, 2), y, mask)
            tokens = tokens + told.view_as(tokens)
            tokens = tokens + mlp_gate * self.mlp(f"{name}.mlp", norm(tokens, mlp_shift, mlp_scale))
        now, clean = (
            (weights["final_layer.scale_shift_table"] + time[:, None])[:, :, None, None].unbind(1) for time in times
        )
        found = norm(tokens, *now)
        found = torch.where(noised[:, :, None, None], found, norm(found, *clean))  # twice, a quirk of the reference
        patches = self.linear("final_layer.linear", found)
        patches = patches.view(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, 2 * channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, 2 * channels, frames, height, width)


def norm(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
