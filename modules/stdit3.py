"""STDiT3, the transformer of Open-Sora 1.2: text to video, with attention within frames and over time in turn.

Constructor arguments, parameter names and shapes are those of the published files. Inside, activations are tokens
(B, T, S, D): D numbers for each of the S patches of a frame, row by row. All blocks are called with the same inputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block, compile_blocks, layer_norm, set_activation_checkpointing
from modules.dit import MAX_PERIOD, Attention, Mlp, TimestepEmbedding, grid_positions, modulate

SIZES = {
    "XL/2": {"hidden_size": 1152, "num_heads": 16, "depth": 28},
    "3B/2": {"hidden_size": 1872, "num_heads": 26, "depth": 28},
}
"""Constructor arguments by published name; all others are the defaults."""


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

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__(hidden_size, num_heads)
        width = hidden_size // num_heads
        self.q_norm, self.k_norm = (HeadNorm(width, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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


class STDiT3Block(Block):
    """Attention within each frame (or, `temporal`, over the frames of each place), attention to the text, and MLP."""

    wide = True

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = layer_norm(hidden_size), layer_norm(hidden_size)
        self.attn = NormedAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def compute(self, x: Tensor, y: Tensor, mask: Tensor | None, time: Tensor, rotation: Tensor) -> Tensor:
        """x (B, T, S, D); y (B, L, D) and its mask (B, L); time (B, T or 1, 6, D); see `Rotation` for the last."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + time)[:, :, None].unbind(3)
        x = x + gate * self._attended(modulate(self.norm1(x), shift, scale), rotation)
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))

    def _attended(self, x: Tensor, rotation: Tensor) -> Tensor:
        if not self.temporal:
            return self.attn(x.flatten(0, 1)).view_as(x)
        places = x.transpose(1, 2)  # (B, S, T, D)
        return self.attn(places.flatten(0, 1), rotation).view(places.shape).transpose(1, 2)


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


class STDiT3(nn.Module):
    """The denoiser. The defaults are STDiT3-XL/2, see `SIZES`.

    Args:
        input_sq_size: side in pixels of the clips whose positions are counted one by one; larger and smaller ones
            have the same range of positions in finer or coarser steps.
        patch_size: (frames, rows, columns) of latents in a token.
        pred_sigma: give as many channels again after the target. Published networks do; no loss of theirs uses them.
        caption_channels, model_max_length: width and largest number of the text's tokens.
        qk_norm: of queries and keys in self-attention.
    """

    conditions = ("y", "mask", "fps", "height", "width", "x_mask", "dropped")

    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ):
        super().__init__()
        if hidden_size % (2 * num_heads) or hidden_size % 4:
            raise ValueError(
                f"num_heads: {hidden_size} / {num_heads} is no even width; hidden_size has to be a multiple of 4 "
                "and of twice num_heads"
            )
        self.input_sq_size, self.patch_size, self.hidden_size = input_sq_size, tuple(patch_size), hidden_size
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.rope = Rotation(hidden_size // num_heads)
        self.x_embedder = ClipEmbedding(self.patch_size, in_channels, hidden_size)
        self.t_embedder, self.fps_embedder = TimestepEmbedding(hidden_size), TimestepEmbedding(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedding(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))
            for temporal in (False, True)
        )
        self.final_layer = TimedFinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self.initialise()

    @property
    def blocks(self) -> list[STDiT3Block]:
        """In the order in which tokens pass them."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights as the published training begins with: temporal blocks do nothing, and the frame rate has
        no influence."""
        for name, module in self.named_modules():
            self.initialise_layer(name, module)

    @torch.no_grad()
    def initialise_layer(self, name: str, layer: nn.Module) -> None:
        """Give a layer, like that of a name, what `initialise` gives it."""
        if isinstance(layer, STDiT3Block | TimedFinalLayer):
            nn.init.normal_(layer.scale_shift_table, std=layer.scale_shift_table.shape[1] ** -0.5)
        elif isinstance(layer, CaptionEmbedding):
            nn.init.normal_(layer.y_embedding, std=layer.y_embedding.shape[1] ** -0.5)
        elif isinstance(layer, Rotation):
            layer.freqs.copy_(layer.frequencies())
        elif isinstance(layer, nn.RMSNorm):
            nn.init.ones_(layer.weight)
        if not isinstance(layer, nn.Linear | nn.Conv3d):
            return
        ends = ("attn.proj", "mlp.fc2")  # of both attentions
        if name == "fps_embedder.mlp.2" or (name.startswith("temporal_blocks.") and name.endswith(ends)):
            nn.init.zeros_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight.flatten(1))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def set_activation_checkpointing(self, level: int) -> None:
        """1: every spatial block; 2 and 3: every block."""
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(self.blocks, graphs)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        dropped: Tensor | None = None,
        target_alone: bool = False,
    ) -> Tensor:
        """Predict the diffusion target of noised latents.

        Args:
            x: (B, C, T, H, W). Zeros at the end fill up frames and sides that no patch divides.
            t: timesteps in 0 to 1,000: (B,), or (B, T) one for each frame of tokens.
            y: encoded text (B, L, C_text).
            fps: (B,) frames a second; 120 says that x is a picture.
            height, width: (B,) of the clip in pixels; those of the first sample count for all.
            mask: (B, L) bool, or integers, tokens of the text that count, at least one of each. None: all.
            x_mask: (B, T) bool, false for given frames of tokens, which are at timestep 0. None: none is given.
            dropped: (B,) bool, captions that the network's empty text replaces; their masks stay. None: none.
            target_alone: without the channels of `pred_sigma`, which no loss of straight flows learns.

        Returns (B, 2 C, T, H, W): the target, then with `pred_sigma` as many channels again, in the dtype of the
        weights. What is said of given frames is of no use; the published program says something else of them there,
        since its last layer modulates them twice. Raises ValueError for text of more than `model_max_length` tokens.
        """
        channels, *size = x.shape[1:]
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        grid = x.shape[1:4]
        x = x.flatten(2, 3) + self._positions(grid[1:], height[0], width[0]).to(x)
        y = self.y_embedder(y, dropped)
        mask = None if mask is None else mask.bool()
        time = self._time(t, fps, x_mask)
        in_blocks, rotation = self.t_block(time).unflatten(2, (6, -1)), self.rope(grid[0])
        for block in self.blocks:
            x = block(x, y, mask, in_blocks, rotation)
        predicted = self._unpatched(self.final_layer(x, time), grid, size)
        return predicted[:, :channels] if target_alone else predicted

    def _time(self, t: Tensor, fps: Tensor, x_mask: Tensor | None) -> Tensor:
        """(B, T or 1, D) of timesteps and frame rates."""
        t = t[:, None] if t.dim() == 1 else t
        t = t if x_mask is None else torch.where(x_mask, t, 0)
        return self.t_embedder(t.flatten()).unflatten(0, t.shape) + self.fps_embedder(fps)[:, None]

    def _positions(self, grid: Sequence[int], height: Tensor, width: Tensor) -> Tensor:
        """(1, S, D) float32: as many positions as a square of S patches has, in steps by the size in pixels."""
        scale = (height.float() * width.float()).sqrt() / self.input_sq_size
        base = round(math.sqrt(math.prod(grid)))
        return grid_positions(grid, self.hidden_size, scale.device, [base / side / scale for side in grid])

    def _unpatched(self, patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
        """(B, T, S, patch * C), channels fastest -> (B, C, T, H, W), without what was filled up."""
        cut = patches.unflatten(2, grid[1:]).unflatten(-1, (*self.patch_size, self.out_channels))
        latents = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        frames, height, width = size
        return latents[:, :, :frames, :height, :width]
