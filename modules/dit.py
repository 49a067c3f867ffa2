"""DiT, the transformer that draws latents of a class (arXiv:2212.09748), and Latte, the same on clips (2401.03048).

Constructor arguments, parameter names and shapes are those of the published files. Inside, activations are tokens
(B, N, D). In Latte the blocks are spatial and temporal in turn: even ones see the positions of a frame, odd ones the
frames of a position.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block, compile_blocks, layer_norm, set_activation_checkpointing

MAX_PERIOD = 10_000
"""Of the sines of positions and of timesteps."""
TIME_WIDTH = 256
"""Numbers that a timestep is embedded as before its layers."""
POSITIONS = ("pos_embed", "temp_embed")
"""Tables of sines in the state: they follow from the sizes, and are not trained."""


def sines(places: Tensor, width: int) -> Tensor:
    """(N, width) of places (N,): half sines, half cosines, in the precision of `places`."""
    powers = torch.arange(width // 2, dtype=places.dtype, device=places.device) / (width / 2)
    angles = places[:, None] * MAX_PERIOD**-powers
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_positions(
    size: Sequence[int], width: int, device: torch.device | None = None, spacing: Sequence[float] = (1, 1)
) -> Tensor:
    """(1, N, width) float32 of the N places of a grid (rows, columns), row by row: columns first, then rows.

    spacing: of rows and of columns.
    """
    rows, columns = (
        sines(torch.arange(side, dtype=_table_dtype(device), device=device) * step, width // 2)
        for side, step in zip(size, spacing, strict=True)
    )
    height, width = size
    both = [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    return torch.cat(both, dim=2).flatten(0, 1)[None].float()


def frame_positions(frames: int, width: int, device: torch.device | None = None, spacing: float = 1) -> Tensor:
    """(1, T, width) float32."""
    return sines(torch.arange(frames, dtype=_table_dtype(device), device=device) * spacing, width)[None].float()


def _table_dtype(device: torch.device | None) -> torch.dtype:
    """float64, as published files hold tables made from it; MPS has none."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, D) with another mean and deviation (B, 1, D)."""
    return x * (1 + scale) + shift


class PatchEmbedding(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D), one for each patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """Timesteps (B,) -> (B, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_WIDTH // 2  # angles up to 1,000 stay in float32, whatever the weights are in
        frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device).float() / half)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Classes (B,) -> (B, D); the last row of the table is the empty class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Tokens (B, N, D) -> (B, N, `out`), by default as wide as they were."""

    def __init__(self, hidden_size: int, inner: int, out: int | None = None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, inner), nn.Linear(inner, out or hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(Block):
    """Attention and MLP of tokens (B, N, D), each modulated and gated by a condition (B, D): adaLN-zero."""

    wide = True

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(hidden_size), layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        made = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = made
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, patch * patch * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The denoiser. The defaults are DiT-XL/2 for pictures of 256 px, which are latents of 32 x 32.

    Args:
        input_size: (rows, columns) of the latents for which `pos_embed` is made, or the side of square ones. Others
            have positions counted from the same corner, as far as they reach.
        num_classes: labels are below it; the label `num_classes` is the empty class.
        learn_sigma: predict a variance beside the target, in as many channels again.
        num_frames: T of the clips of a Latte, for which `temp_embed` is made; its blocks are spatial and temporal in
            turn. None for pictures. Other clips have positions counted from the same first frame.
    """

    conditions = ("y",)

    @property
    def token_width(self) -> int:
        """D: of the tokens, which are the patches row by row."""
        return self.hidden_size

    @property
    def token_arguments(self) -> dict[str, int] | None:
        """No argument of a block is per token, see `warpcore.networks`; a Latte's blocks see frames and places in turn
        and have none."""
        return {} if self.num_frames is None else None

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        num_frames: int | None = None,
    ):
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"num_heads: {num_heads} and 4 have to divide hidden_size, {hidden_size}")
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if any(side % patch_size for side in size):
            raise ValueError(f"input_size: patch_size {patch_size} does not divide {size[0]} x {size[1]}")
        self.patch_size, self.hidden_size, self.num_classes = patch_size, hidden_size, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid, self.num_frames = tuple(side // patch_size for side in size), num_frames
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        self.register_buffer("pos_embed", grid_positions(self.grid, hidden_size))
        if num_frames is not None:
            self.register_buffer("temp_embed", frame_positions(num_frames, hidden_size))
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as the published training begins with: every block does nothing (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(weight.weight, std=0.02)
        for module in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @torch.no_grad()
    def initialise_layer(self, name: str, layer: nn.Module) -> None:
        """Give a layer, like that of a name, what `initialise` gives it."""
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            nn.init.zeros_(layer.weight)
        elif name.startswith(("t_embedder.", "y_embedder.")):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)

    def set_activation_checkpointing(self, level: int) -> None:
        """1: every second block; 2 and 3: every block."""
        set_activation_checkpointing(list(self.blocks), level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(list(self.blocks), graphs)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the diffusion target of noised latents, and what says its variance.

        Args:
            x: (B, C, H, W), or clips (B, C, T, H, W) where the network has `num_frames`; sides are multiples of the
                patch size.
            t: timesteps (B,).
            y: classes (B,) int64.

        Returns (B, 2 C, ...): the target, then with `learn_sigma` the variance, in the dtype of the weights.
        """
        frames = x.shape[2] if self.num_frames is not None else 1
        if x.dim() != (4 if self.num_frames is None else 5):
            raise ValueError(f"latents of {tuple(x.shape)}: pictures have 4 dimensions, clips of a Latte 5")
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(f"latents of {x.shape[-2]} x {x.shape[-1]}: sides are multiples of {self.patch_size}")
        grid = tuple(side // self.patch_size for side in x.shape[-2:])
        x = x.transpose(1, 2).flatten(0, 1) if self.num_frames is not None else x
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        x = x + self._positions(grid, x)
        condition = self.t_embedder(t) + self.y_embedder(y)
        x = self._run_blocks(x, condition, frames)
        return self._unpatched(self.final_layer(x, _repeated(condition, frames)), grid, frames)

    def _positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        table = self.pos_embed if grid == self.grid else grid_positions(grid, self.hidden_size, like.device)
        return table.to(like.dtype)

    def _frame_positions(self, frames: int, like: Tensor) -> Tensor:
        table = (
            self.temp_embed if frames <= self.num_frames else frame_positions(frames, self.hidden_size, like.device)
        )
        return table[:, :frames].to(like.dtype)

    def _run_blocks(self, x: Tensor, condition: Tensor, frames: int) -> Tensor:
        """Tokens (B T, N, D) -> the same."""
        if self.num_frames is None:
            for block in self.blocks:
                x = block(x, condition)
            return x
        of_frames, of_places = _repeated(condition, frames), _repeated(condition, x.shape[1])
        for number, block in enumerate(self.blocks):
            if number % 2 == 0:
                x = block(x, of_frames)
                continue
            x = _swapped(x, frames)  # (B N, T, D)
            if number == 1:
                x = x + self._frame_positions(frames, x)
            x = _swapped(block(x, of_places), x.shape[0] // len(condition))
        return x

    def _unpatched(self, patches: Tensor, grid: tuple[int, int], frames: int) -> Tensor:
        """(B T, N, patch * patch * C), channels fastest -> (B, C, H, W) or (B, C, T, H, W)."""
        side = self.patch_size
        cut = patches.unflatten(1, grid).unflatten(-1, (side, side, self.out_channels))
        latents = cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return latents if self.num_frames is None else latents.unflatten(0, (-1, frames)).transpose(1, 2)


def _repeated(condition: Tensor, times: int) -> Tensor:
    """(B, D) -> (B times, D), each row `times` times after itself."""
    return condition if times == 1 else condition.repeat_interleave(times, dim=0)


def _swapped(x: Tensor, inner: int) -> Tensor:
    """Tokens (B inner, N, D) -> (B N, inner, D): what was in the batch is attended to."""
    return x.unflatten(0, (-1, inner)).transpose(1, 2).flatten(0, 1)
