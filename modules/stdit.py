"""STDiT and STDiT2, the transformers of Open-Sora 1.0 and 1.1: text to video, with attention within frames and over
time in each block.

Constructor arguments, parameter names and shapes are those of the published files. Inside, activations are tokens
(B, T, S, D): D numbers for each of the S patches of a frame, row by row. All blocks are called with the same inputs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.blocks import Block, layer_norm
from modules.dit import Mlp, TimestepEmbedding, frame_positions, grid_positions, modulate
from modules.sequence import TokenShards
from modules.stdit_parts import (
    CaptionEmbedding,
    ClipEmbedding,
    ClipTransformer,
    CrossAttention,
    NormedAttention,
    Rotation,
    TimedFinalLayer,
    check_heads,
    over_frames,
    within_frames,
)

XL_2 = {"hidden_size": 1152, "num_heads": 16, "depth": 28}
"""Constructor arguments of both published networks; all others are the defaults."""
POSITIONS = ("pos_embed", "pos_embed_temporal")
"""Tables of sines in the state of an STDiT: they follow from the sizes, and are not trained."""


class STDiTBlock(Block):
    """Attention within each frame and over the frames of each place, attention to the text, and MLP: of an STDiT."""

    wide = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        adds_positions: bool = False,
        qk_norm: bool = False,
        rotate_first: bool = False,
    ):
        """adds_positions: attention over time is told where frames are; so it is in the first block.
        qk_norm, rotate_first: see `NormedAttention`."""
        super().__init__()
        self.adds_positions = adds_positions
        self.norm1, self.norm2 = layer_norm(hidden_size), layer_norm(hidden_size)
        self.attn, self.attn_temp = (NormedAttention(hidden_size, num_heads, qk_norm, rotate_first) for _ in range(2))
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def compute(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        time: Tensor,
        over_time: Tensor,
        frames: Tensor,
        shards: TokenShards | None = None,
    ) -> Tensor:
        """x (B, T, S, D); y (B, L, D) and its mask (B, L); time (B, T or 1, 6, D); for `attended_over_time`, what the
        timestep is there, and where frames are; shards: where the S patches are a part of those of a frame."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + time)[:, :, None].unbind(3)
        x = x + gate * within_frames(self.attn, modulate(self.norm1(x), shift, scale), shards)
        x = x + self.attended_over_time(x, over_time, frames)
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))

    def attended_over_time(self, x: Tensor, time: Tensor, frames: Tensor) -> Tensor:
        """time (B, 1, 6, D) of which the gate of the attention within frames is taken; frames (1, T, 1, D)."""
        gate = (self.scale_shift_table[2] + time[:, :, 2])[:, :, None]
        return gate * over_frames(self.attn_temp, x + frames if self.adds_positions else x)


class STDiT2Block(STDiTBlock):
    """The same of an STDiT2: attention over time is modulated, and told where frames are by rotation."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, qk_norm_legacy: bool):
        super().__init__(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, rotate_first=qk_norm_legacy)
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, hidden_size))

    def attended_over_time(self, x: Tensor, time: Tensor, frames: Tensor) -> Tensor:
        """time (B, T or 1, 3, D); for `frames` see `Rotation`."""
        shift, scale, gate = (self.scale_shift_table_temporal + time)[:, :, None].unbind(3)
        return gate * over_frames(self.attn_temp, modulate(self.norm1(x), shift, scale), frames)


class STDiT(ClipTransformer):
    """The denoiser of Open-Sora 1.0. The defaults are those of 16 frames of 256 px, see `XL_2`.

    Args:
        input_size: (frames, rows, columns) of the latents for which the tables of positions are made. Others have
            positions counted from the same corner and the same first frame.
        patch_size: (frames, rows, columns) of latents in a token.
        pred_sigma: predict a variance beside the target, in as many channels again.
        caption_channels, model_max_length: width and largest number of the text's tokens.
        space_scale, time_scale: places and frames are counted in steps of 1 / this.
    """

    conditions = ("y", "mask", "x_mask", "dropped")

    def __init__(
        self,
        input_size: Sequence[int] = (16, 32, 32),
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ):
        super().__init__()
        check_heads(hidden_size, num_heads)
        self.patch_size, self.hidden_size = tuple(patch_size), hidden_size
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.space_scale, self.time_scale = space_scale, time_scale
        self.grid = tuple(math.ceil(side / patch) for side, patch in zip(input_size, patch_size, strict=True))
        for name, table in zip(POSITIONS, self.positions(self.grid), strict=True):
            self.register_buffer(name, table)
        self.x_embedder = ClipEmbedding(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedding(caption_channels, hidden_size, model_max_length)
        self.blocks = nn.ModuleList(
            STDiTBlock(hidden_size, num_heads, mlp_ratio, adds_positions=number == 0) for number in range(depth)
        )
        self.final_layer = TimedFinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self.initialise()

    @classmethod
    def begins_with_zeros(cls, name: str) -> bool:
        """Attention over time and to the text do nothing at first, and the last layer gives zeros."""
        return name.endswith(("attn_temp.proj", "cross_attn.proj")) or name == "final_layer.linear"

    @classmethod
    @torch.no_grad()
    def initialise_layer(cls, name: str, layer: nn.Module) -> None:
        super().initialise_layer(name, layer)
        if isinstance(layer, STDiT):
            for own, table in zip(POSITIONS, layer.positions(layer.grid), strict=True):
                getattr(layer, own).copy_(table)

    def positions(self, grid: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Those of places (1, S, D) and of frames (1, T, D) float32, of a grid of tokens (frames, rows, columns)."""
        places = grid_positions(grid[1:], self.hidden_size, device, [1 / self.space_scale] * 2)
        return places, frame_positions(grid[0], self.hidden_size, device, 1 / self.time_scale)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Predict the diffusion target of noised latents, and what says its variance.

        Args:
            x: (B, C, T, H, W). Zeros at the end fill up frames and sides that no patch divides.
            t: timesteps in 0 to 1,000: (B,).
            y: encoded text (B, L, C_text).
            mask: (B, L) bool, or integers, tokens of the text that count, at least one of each. None: all.
            x_mask: (B, T) bool, false for given frames of tokens, which are at timestep 0. None: none is given.
            dropped: (B,) bool, captions that the network's empty text replaces; their masks stay. None: none.

        Returns (B, 2 C, T, H, W): the target, then with `pred_sigma` the variance, in the dtype of the weights. What
        is said of given frames is of no use. Raises ValueError for text of more than `model_max_length` tokens.
        """
        size = x.shape[2:]
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        grid = tuple(x.shape[1:4])
        same = grid == self.grid
        places, frames = (self.pos_embed, self.pos_embed_temporal) if same else self.positions(grid, x.device)
        x = x.flatten(2, 3) + places.to(x)
        y = self.y_embedder(y, dropped)
        mask = None if mask is None else mask.bool()
        time, noised = self.embedded_times(t, x_mask), self.embedded_times(t, None)
        in_blocks, over_time = (self.t_block(one).unflatten(2, (6, -1)) for one in (time, noised))
        patches = self.patches(x, time, y, mask, in_blocks, over_time, frames[:, :, None].to(x))
        return self.unpatched(patches, grid, size)


class STDiT2(ClipTransformer):
    """The denoiser of Open-Sora 1.1, for clips of any size. The defaults are the published network, see `XL_2`.

    Args:
        input_sq_size: side in pixels of the clips whose positions are counted one by one; larger and smaller ones
            have the same range of positions in finer or coarser steps.
        patch_size, pred_sigma, caption_channels, model_max_length: see `STDiT`.
        qk_norm: of queries and keys in self-attention; with `qk_norm_legacy` after they were rotated, as published.
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
        model_max_length: int = 200,
        qk_norm: bool = True,
        qk_norm_legacy: bool = True,
    ):
        super().__init__()
        check_heads(hidden_size, num_heads)
        if hidden_size % 3:
            raise ValueError(f"hidden_size: {hidden_size}; height, width and aspect ratio have a third each")
        self.input_sq_size, self.patch_size, self.hidden_size = input_sq_size, tuple(patch_size), hidden_size
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.x_embedder = ClipEmbedding(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.t_block, self.t_block_temp = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, tables * hidden_size)) for tables in (6, 3)
        )
        self.y_embedder = CaptionEmbedding(caption_channels, hidden_size, model_max_length)
        self.rope = Rotation(hidden_size // num_heads)
        self.blocks = nn.ModuleList(
            STDiT2Block(hidden_size, num_heads, mlp_ratio, qk_norm, qk_norm_legacy) for _ in range(depth)
        )
        self.final_layer = TimedFinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self.csize_embedder, self.ar_embedder = (TimestepEmbedding(hidden_size // 3) for _ in range(2))
        self.fl_embedder, self.fps_embedder = (TimestepEmbedding(hidden_size) for _ in range(2))
        self.initialise()

    @classmethod
    def begins_with_zeros(cls, name: str) -> bool:
        """As an `STDiT`."""
        return name.endswith(("attn_temp.proj", "cross_attn.proj")) or name == "final_layer.linear"

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
    ) -> Tensor:
        """Predict the diffusion target of noised latents, and what says its variance.

        Args:
            fps: (B,) frames a second; 120 says that x is a picture.
            height, width: (B,) of the clip in pixels; positions are by those of the first sample.
            x, t, y, mask, x_mask, dropped: see `STDiT.forward`. The network is told T as the number of frames, since
                the published autoencoder has a latent one for each.

        Returns (B, 2 C, T, H, W): the target, then with `pred_sigma` the variance, in the dtype of the weights. What
        is said of given frames is of no use. Raises ValueError for text of more than `model_max_length` tokens.
        """
        size = x.shape[2:]
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        grid = x.shape[1:4]
        x = x.flatten(2, 3) + self.sized_positions(grid[1:], height[0], width[0], self.input_sq_size).to(x)
        y = self.y_embedder(y, dropped)
        mask = None if mask is None else mask.bool()
        sides = [self.csize_embedder(height), self.csize_embedder(width), self.ar_embedder(height / width)]
        length = self.fl_embedder(torch.full_like(fps, size[0])) + self.fps_embedder(fps)
        time = self.embedded_times(t, x_mask)
        in_frames = self.t_block(time + torch.cat(sides, dim=1)[:, None]).unflatten(2, (6, -1))
        over_time, rotation = self.t_block_temp(time + length[:, None]).unflatten(2, (3, -1)), self.rope(grid[0])
        patches = self.patches(x, self.embedded_times(t, None), y, mask, in_frames, over_time, rotation)
        return self.unpatched(patches, grid, size)
