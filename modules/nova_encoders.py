"""The two encoders of NOVA's transformer, whose tokens (B, N, D) follow those of a condition (B, L, D)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block
from modules.nova_decoder import PatchTokens
from modules.nova_embeddings import GridPositions, GridRotation, grid_places
from modules.stdit_parts import rotate


class KeptKeys:
    """Keys and values (B, heads, N, width) of one block and all frames so far."""

    def __init__(self):
        self.kept: tuple[Tensor, Tensor] | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those so far and these, which are kept with them."""
        if self.kept is not None:
            keys, values = (torch.cat([old, new], dim=2) for old, new in zip(self.kept, (keys, values), strict=True))
        self.kept = keys, values
        return keys, values


@dataclass
class ClipState:
    """What is kept of a clip that is being drawn frame by frame."""

    frames: int
    """In all: times of frames are relative to it."""
    frame: int = 0
    """The next one."""
    keys: list[KeptKeys] = field(default_factory=list)
    """Of each block of the video encoder."""
    first: Tensor | None = None
    """What the encoder gave for the first frame (B, M, D)."""


class SelfAttention(nn.Module):
    """Attention of tokens (B, N, D) to each other, and to what is kept of earlier ones."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: Tensor | None, kept: KeptKeys | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if kept is not None:
            k, v = kept.extended(k, v)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class WideLayers(nn.Module):
    """Tokens (B, N, D) -> the same, by a layer of four times the width."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(Block):
    """Attention and MLP, whose results are normed before they are added.

    Checkpointing computes the MLP again, never attention.
    """

    wide = True

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.mlp = WideLayers(hidden_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotation: Tensor | None = None,
        kept: KeptKeys | None = None,
    ) -> Tensor:
        """x (B, N, D); mask (N, N) bool, true where a token sees another; rotation (2, [B, 1,] N, width / 2)."""
        return super().forward(x + self.norm1(self.attn(x, mask, rotation, kept)))

    def compute(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.mlp(x))


class Encoder(nn.Module):
    """What both encoders are: patches, blocks and a norm."""

    def __init__(
        self, channels: int, patch: int, *, depth: int, embed_dim: int, num_heads: int, rotary: bool
    ):  # fmt: skip
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"arch: {embed_dim} numbers cannot be cut for {num_heads} heads, or in sines of places")
        self.patch_embed = PatchTokens(channels, embed_dim, patch)
        self.blocks = nn.ModuleList(EncoderBlock(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.rope = GridRotation(embed_dim // num_heads) if rotary else None


class Mixer(nn.Module):
    """Scales and shifts what was made of the first frame, by what was made of a later one."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.lora = nn.Linear(hidden_size, rank, bias=False) if rank > 0 else nn.Identity()
        self.proj = nn.Linear(rank if rank > 0 else hidden_size, 2 * hidden_size)

    def forward(self, first: Tensor, later: Tensor) -> Tensor:
        """Like `later`: (B, T, M, D) with `first` (B, 1, M, D), or both (B, M, D)."""
        scale, shift = self.proj(self.lora(F.silu(later))).chunk(2, dim=-1)
        return first * (1 + scale) + shift


class VideoEncoder(Encoder):
    """A frame sees the text, itself and earlier frames."""

    def __init__(self, channels: int, patch: int, *, rank: int | None, **numbers):
        super().__init__(channels, patch, **numbers)
        self.mixer = Mixer(numbers["embed_dim"], rank) if rank else None

    def all_frames(self, x: Tensor, condition: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, T, M, D) -> the same, behind a condition (B, L, D) that counts as part of the first frame."""
        frames, in_front = x.shape[1], condition.shape[1]
        mask = frame_mask(in_front, frames, x.shape[2], x.device) if frames > 1 else None
        rotation = self.rope and self.rope(grid_places(range(frames), *grid, x.device, in_front))
        made = self.encoded(x.flatten(1, 2), condition, mask, rotation).view_as(x)
        if self.mixer is None or frames == 1:
            return made
        first = made[:, :1]
        return torch.cat([first, self.mixer(first, made[:, 1:])], dim=1)

    def next_frame(self, x: Tensor, condition: Tensor, clip: ClipState, grid: Sequence[int]) -> Tensor:
        """What `all_frames` makes of one frame (B, M, D), after those before it. The state moves on by a frame."""
        if not clip.keys:
            clip.keys = [KeptKeys() for _ in self.blocks]
        condition = condition[:, : None if clip.frame == 0 else 0]
        places = grid_places(range(clip.frame, clip.frame + 1), *grid, x.device, condition.shape[1])
        made = self.encoded(x, condition, None, self.rope and self.rope(places), clip.keys)
        clip.frame += 1
        if clip.first is None:
            clip.first = made
            return made
        return made if self.mixer is None else self.mixer(clip.first, made)

    def encoded(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        rotation: Tensor | None = None,
        keys: Sequence[KeptKeys] = (),
    ) -> Tensor:
        """Tokens (B, N, D) -> the same, behind a condition (B, L, D) that mask and rotation count, too."""
        tokens = torch.cat([condition.to(x.dtype), x], dim=1)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, mask, rotation, keys[number] if keys else None)
        return self.norm(tokens[:, condition.shape[1] :])


class ImageEncoder(Encoder):
    """The first half of the blocks sees the tokens of a frame that are there, the second half all of them."""

    def __init__(self, channels: int, patch: int, base_size: Sequence[int], **numbers):
        super().__init__(channels, patch, **numbers)
        self.pos_embed = GridPositions(base_size, numbers["embed_dim"])

    def forward(self, x: Tensor, condition: Tensor, visible: Tensor | None, grid: Sequence[int]) -> Tensor:
        """Tokens (B, N, D) -> the same.

        Args:
            condition: (B, L, D). grid: rows and columns of the tokens.
            visible: (B, K) the numbers of those that are there; None: all are, for all blocks.
        """
        in_front = condition.shape[1]
        half = 0 if visible is None else len(self.blocks) // 2
        rotation = self.rope and self.rope(grid_places(range(1), *grid, x.device, in_front))
        condition = condition.to(x.dtype)
        if half:
            chosen = visible[:, :, None].expand(-1, -1, x.shape[2])
            tokens = torch.cat([condition, x.gather(1, chosen)], dim=1)
            turned = None if rotation is None else _of_tokens(rotation, visible, in_front)
            for block in self.blocks[:half]:
                tokens = block(tokens, None, turned)
            condition, seen = tokens.split([in_front, visible.shape[1]], dim=1)
            x = x.to(seen.dtype).scatter(1, chosen, seen)  # under autocast blocks give float32
        tokens = torch.cat([condition, x], dim=1)
        for block in self.blocks[half:]:
            tokens = block(tokens, None, rotation)
        return self.norm(tokens[:, in_front:])


def frame_mask(in_front: int, frames: int, tokens: int, device: torch.device) -> Tensor:
    """(in_front + T M, the same) bool: true where a token (row) sees another: of its own frame, or of an earlier one.
    Tokens in front count as part of the first frame."""
    frame = torch.arange(frames, device=device).repeat_interleave(tokens)
    frame = F.pad(frame, (in_front, 0))
    return frame[:, None] >= frame


def _of_tokens(rotation: Tensor, visible: Tensor, in_front: int) -> Tensor:
    """(2, B, 1, in_front + K, width / 2): the turns of tokens in front, and of the visible ones of each sample."""
    turned = rotation[:, in_front:][:, visible]  # (2, B, K, width / 2)
    first = rotation[:, None, :in_front].expand(-1, len(visible), -1, -1)
    return torch.cat([first, turned], dim=2)[:, :, None]
