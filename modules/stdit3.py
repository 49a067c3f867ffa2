"""STDiT3, the transformer of Open-Sora 1.2: text to video, with attention within frames and over time in turn.

Constructor arguments, parameter names and shapes are those of the published files. Inside, activations are tokens
(B, T, S, D): D numbers for each of the S patches of a frame, row by row. All blocks are called with the same inputs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.blocks import Block, layer_norm
from modules.dit import Mlp, TimestepEmbedding, modulate
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

SIZES = {
    "XL/2": {"hidden_size": 1152, "num_heads": 16, "depth": 28},
    "3B/2": {"hidden_size": 1872, "num_heads": 26, "depth": 28},
}
"""Constructor arguments by published name; all others are the defaults."""


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

    def compute(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        time: Tensor,
        rotation: Tensor,
        shards: TokenShards | None = None,
    ) -> Tensor:
        """x (B, T, S, D); y (B, L, D) and its mask (B, L); time (B, T or 1, 6, D); for `rotation` see `Rotation`;
        shards: where the S patches are a part of those of a frame."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + time)[:, :, None].unbind(3)
        seen = modulate(self.norm1(x), shift, scale)
        seen = over_frames(self.attn, seen, rotation) if self.temporal else within_frames(self.attn, seen, shards)
        x = x + gate * seen
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class STDiT3(ClipTransformer):
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
        check_heads(hidden_size, num_heads)
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

    @classmethod
    def begins_with_zeros(cls, name: str) -> bool:
        """Temporal blocks do nothing at first, and the frame rate has no influence."""
        ends = ("attn.proj", "mlp.fc2")  # of both attentions
        return name == "fps_embedder.mlp.2" or (name.startswith("temporal_blocks.") and name.endswith(ends))

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
        x = x.flatten(2, 3) + self.sized_positions(grid[1:], height[0], width[0], self.input_sq_size).to(x)
        y = self.y_embedder(y, dropped)
        mask = None if mask is None else mask.bool()
        time = self.embedded_times(t, x_mask) + self.fps_embedder(fps)[:, None]
        in_blocks, rotation = self.t_block(time).unflatten(2, (6, -1)), self.rope(grid[0])
        predicted = self.unpatched(self.patches(x, time, y, mask, in_blocks, rotation), grid, size)
        return predicted[:, :channels] if target_alone else predicted
