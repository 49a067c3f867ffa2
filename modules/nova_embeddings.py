"""What NOVA's transformer is told beside latents: texts, classes, motion, places of tokens, and hidden tokens.

Parameter names and shapes are those of the published files.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.dit import MAX_PERIOD, TIME_WIDTH, grid_positions, sines

NULL_ROWS = 512
"""Of the empty text in the published files; a text has up to `text_token_len` of them."""
DEFAULT_FPS = 12.0
"""Frames a second where none are given."""
DEVIATION = 0.02
"""Of tokens in a new network."""


def sinusoid_mlp(hidden_size: int) -> nn.Sequential:
    """Sines of a number (N, 256) -> (N, D)."""
    return nn.Sequential(nn.Linear(TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))


def embedded_numbers(layers: nn.Sequential, numbers: Tensor) -> Tensor:
    """(N, D) of numbers (N,), whose sines are computed in float32 whatever the weights are in."""
    return layers(sines(numbers.float(), TIME_WIDTH).to(layers[0].weight.dtype))


class TextEmbedding(nn.Module):
    """Encoded texts -> tokens (B, L, D). `weight` holds the rows of the empty text: saved, and not trained."""

    def __init__(self, token_dim: int, hidden_size: int, length: int):
        super().__init__()
        if length > NULL_ROWS:
            raise ValueError(f"text_token_len: {length} tokens, but an empty text has {NULL_ROWS}; write fewer")
        self.length = length
        self.register_buffer("weight", torch.empty(NULL_ROWS, token_dim))
        self.proj = nn.Linear(token_dim, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=DEVIATION)

    def filled(self, text: Tensor, lengths: Tensor) -> Tensor:
        """(B, L, C) of texts (B, N, C) and their numbers of tokens (B,): rows of the empty text follow each.

        A text of 0 tokens is the empty one. Raises ValueError where N is above L.
        """
        if text.shape[1] > self.length:
            raise ValueError(f"text of {text.shape[1]} tokens: text_token_len is {self.length}")
        empty = self.weight[: self.length]
        padded = F.pad(text.to(empty.dtype), (0, 0, 0, self.length - text.shape[1]))
        inside = torch.arange(self.length, device=text.device) < lengths[:, None]
        return torch.where(inside[:, :, None], padded, empty)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(self.proj(self.filled(text, lengths)))


class LabelEmbedding(nn.Module):
    """Classes (B,) -> a token (B, 1, D); the last row of the table is no class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes + 1, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=DEVIATION)

    def forward(self, labels: Tensor) -> Tensor:
        return self.norm(self.weight[labels])[:, None]


class MotionEmbedding(nn.Module):
    """Motion scores and frames a second (B,) -> two tokens (B, 2, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.flow_proj, self.fps_proj = sinusoid_mlp(hidden_size), sinusoid_mlp(hidden_size)

    def forward(self, flow: Tensor, fps: Tensor | None = None) -> Tensor:
        """fps: 12 where it is None."""
        fps = torch.full_like(flow, DEFAULT_FPS) if fps is None else fps
        return torch.stack(
            [embedded_numbers(self.flow_proj, flow), embedded_numbers(self.fps_proj, fps)], dim=1
        )  # fmt: skip


class GridPositions(nn.Module):
    """Tokens (..., N, D) with the sines of their places in a grid of one size."""

    def __init__(self, size: Sequence[int], hidden_size: int):
        super().__init__()
        self.size, self.hidden_size = tuple(size), hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return x + grid_positions(self.size, self.hidden_size, x.device)[0].to(x.dtype)


class VideoPositions(nn.Module):
    """Tokens (B, T, N, D) of frames with the sines of their places, and what layers make of the frames' times.

    Clips of every length are stretched to `size[0]` frames: frame i of T is at i / T of it.
    """

    def __init__(self, size: Sequence[int], hidden_size: int):
        super().__init__()
        self.frames, *grid = size
        self.time_proj = sinusoid_mlp(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.space = GridPositions(grid, hidden_size)

    def times(self, frames: int) -> Tensor:
        """(T, 1, D)."""
        places = torch.arange(frames, device=self.norm.weight.device) * (self.frames / frames)
        return self.norm(embedded_numbers(self.time_proj, places))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.space(x) + self.times(x.shape[1])


class MaskEmbedding(nn.Module):
    """The tokens that stand for the frame before the first, and for a token that is hidden; each (1, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.empty(1, hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bos_token, std=DEVIATION)
        nn.init.normal_(self.mask_token, std=DEVIATION)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Tokens (B, N, D) with the mask token where `hidden` (B, N) is true."""
        return torch.where(hidden[:, :, None], self.mask_token.to(x.dtype), x)


class GridRotation(nn.Module):
    """Rotary positions (arXiv:2104.09864) of tokens in frames, rows and columns, for heads of a width.

    An eighth of the numbers turns with the frame, and half of the others each with the row and with the column.
    """

    def __init__(self, width: int):
        super().__init__()
        of_frames = width // 8
        of_sides = (width - of_frames) // 2
        self.widths = (of_frames, of_sides, of_sides)
        pairs = sum(-(-size // 2) for size in self.widths)
        if 2 * pairs != width:
            raise ValueError(f"rotary_pos_embed: heads of {width} numbers cannot be turned; 32, 64 and 96 can")

    def forward(self, places: Tensor) -> Tensor:
        """(2, ..., width / 2) float32 of places (..., 3): cosines and sines."""
        angles = [
            places[..., axis, None].float() * _frequencies(size, places.device)
            for axis, size in enumerate(self.widths)
        ]
        angles = torch.cat(angles, dim=-1)
        return torch.stack([angles.cos(), angles.sin()])


def _frequencies(size: int, device: torch.device) -> Tensor:
    return MAX_PERIOD ** -(torch.arange(0, size, 2, device=device).float() / size)


def grid_places(frames: range, rows: int, columns: int, device: torch.device, in_front: int = 0) -> Tensor:
    """(in_front + T N, 3) float32: frame, row and column of the tokens of frames, row by row. Those in front of them
    have (0, 0, 0)."""
    along = (frames, range(rows), range(columns))
    axes = [torch.arange(axis.start, axis.stop, device=device).float() for axis in along]
    return F.pad(torch.cartesian_prod(*axes), (0, 0, in_front, 0))
