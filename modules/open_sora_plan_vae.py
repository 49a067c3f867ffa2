"""The autoencoder of NOVA's clips, which is that of Open-Sora-Plan 1.2: 8 x smaller in space, 4 x in time.

Every frame is seen by itself and later ones alone: in front of a clip its first frame is repeated. Parameter names and
shapes are those of `AutoencoderKLOpenSora`; `from_open_sora_plan` reads those of the other. Activations are
(B, C, T, H, W), in the first part of the encoder (B T, C, H, W). `modules/open_sora_vae.py` is another network.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block, compile_blocks, set_activation_checkpointing

GROUPS, EPS = 32, 1e-6
"""Of every norm."""
FRAMES, LATENTS = 17, 5
"""Of a tile in time. Neighbouring tiles share one."""
DOWN = ("DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock3D", "DownEncoderBlock3D")
UP = ("UpDecoderBlock3D",) * 4


class CausalConv(nn.Conv3d):
    """Three-dimensional convolution of the same size, of which a frame sees itself and earlier ones."""

    def __init__(self, c_in: int, c_out: int, kernel_size: Sequence[int] = (3, 3, 3)):
        time, *space = kernel_size
        super().__init__(c_in, c_out, kernel_size, padding=(0, *(side // 2 for side in space)))
        self.in_front = time - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(repeated_in_front(x, self.in_front))


def repeated_in_front(x: Tensor, times: int) -> Tensor:
    """(B, C, T + times, H, W): the first frame that many times more."""
    return torch.cat([x[:, :, :1].expand(-1, -1, times, -1, -1), x], dim=2) if times else x


def convolution(c_in: int, c_out: int, flat: bool, side: int = 3) -> nn.Module:
    """Of frames (`flat`), or of clips."""
    return nn.Conv2d(c_in, c_out, side, padding=side // 2) if flat else CausalConv(c_in, c_out, (side,) * 3)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class ResBlock(Block):
    """Two normed convolutions beside the input, which a third brings to another width."""

    wide = True

    def __init__(self, c_in: int, c_out: int, flat: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(c_in), norm(c_out)
        self.conv1, self.conv2 = convolution(c_in, c_out, flat), convolution(c_out, c_out, flat)
        self.conv_shortcut = convolution(c_in, c_out, flat, side=1) if c_in != c_out else nn.Identity()

    def compute(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class FrameAttention(Block):
    """Attention of the positions of each frame to each other, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def compute(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H W, C): the norm is over all frames
        made = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        made = self.to_out[0](made).unflatten(2, x.shape[3:])
        return x + made.permute(0, 4, 1, 2, 3)


class Downsampler(nn.Module):
    """Half as many rows and columns; of clips half as many frames too, the first of which stands for itself."""

    def __init__(self, channels: int, flat: bool):
        super().__init__()
        self.conv = (nn.Conv2d if flat else nn.Conv3d)(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        flat = isinstance(self.conv, nn.Conv2d)
        x = F.pad(x, (0, 1, 0, 1) if flat else (0, 1, 0, 1, 0, 0))
        return self.conv(x if flat else repeated_in_front(x, 2))


class Upsampler(nn.Module):
    """Twice as many rows and columns; with `time` twice as many of all frames but the first."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = CausalConv(channels, channels, (3, 3, 3) if time else (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.time:
            return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
        parts = [F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")]
        if x.shape[2] > 1:
            parts.append(F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear"))
        return self.conv(torch.cat(parts, dim=2))


class Level(nn.Module):
    """The residual blocks of one width, and what changes the size after them."""

    def __init__(self, blocks: Sequence[ResBlock], down: Downsampler | None = None, up: Upsampler | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def resized(self, x: Tensor) -> Tensor:
        for name in ("downsamplers", "upsamplers"):
            for layer in getattr(self, name, ()):
                x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class Middle(nn.Module):
    """A residual block, attention, and another."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _res_blocks(c_in: int, c_out: int, count: int, flat: bool = False) -> list[ResBlock]:
    return [ResBlock(c_out if i else c_in, c_out, flat) for i in range(count)]


class Encoder(nn.Module):
    """Clips (B, 3, T, H, W) -> (B, 2 C, t, H / 8, W / 8). The first two levels look at frames one by one."""

    FLAT = 2

    def __init__(self, widths: Sequence[int], layers: int, latent_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                _res_blocks(widths[max(i - 1, 0)], width, layers, flat=i < self.FLAT),
                down=Downsampler(width, flat=i + 1 < self.FLAT) if i + 1 < len(widths) else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        samples = len(x)
        x = self.conv_in(x.transpose(1, 2).flatten(0, 1))
        for i, level in enumerate(self.down_blocks):
            x = level(x)
            if i + 1 == self.FLAT:
                x = x.unflatten(0, (samples, -1)).transpose(1, 2)
            x = level.resized(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, C, t, h, w) -> clips (B, 3, 4 t - 3, 8 h, 8 w)."""

    def __init__(self, widths: Sequence[int], layers: int, latent_channels: int):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = CausalConv(latent_channels, widths[0])
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            Level(
                _res_blocks(widths[max(i - 1, 0)], width, layers + 1),
                up=Upsampler(width, time=i < 2) if i + 1 < len(widths) else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level.resized(level(x))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class OpenSoraPlanAutoencoder(nn.Module):
    """Clips in [-1, 1] of 4 n + 1 frames to latents of n + 1, and back. The defaults are the published network.

    Clips of more than 17 frames are encoded in tiles of 17 that share a frame, and decoded in tiles of 5 latents that
    share one; what the shared one gives is taken of the earlier tile. A last tile that is shorter is encoded, or
    decoded, as it is, where the reference drops it with its frames.

    Raises ValueError for other kinds of blocks.
    """

    forward_methods = ("encode", "decode")
    compression, time_compression = 8, 4

    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        down_block_types: Sequence[str] = DOWN,
        up_block_types: Sequence[str] = UP,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
    ):
        super().__init__()
        for name, said, wanted in (
            ("down_block_types", down_block_types, DOWN),
            ("up_block_types", up_block_types, UP),
        ):
            if tuple(said) != wanted:
                raise ValueError(f"{name}: {list(said)} is not what this network has; write {list(wanted)}")
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor or 0.0
        self.encoder = Encoder(block_out_channels, layers_per_block, latent_channels)
        self.quant_conv = CausalConv(2 * latent_channels, 2 * latent_channels, (1, 1, 1))
        self.post_quant_conv = CausalConv(latent_channels, latent_channels, (1, 1, 1))
        self.decoder = Decoder(block_out_channels, layers_per_block, latent_channels)

    @property
    def blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def set_activation_checkpointing(self, level: int) -> None:
        """1: every second residual block; 2: all of them; 3: attention, too."""
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(self.blocks, graphs)

    def latent_frames(self, frames: int) -> int:
        """n + 1 of 4 n + 1 frames. Raises ValueError for another number: the last ones would have no latent."""
        if frames % self.time_compression != 1:
            fewer = max((frames - 1) // self.time_compression, 0) * self.time_compression + 1
            more = fewer + self.time_compression
            raise ValueError(
                f"clips of {frames} frames: write one more than a multiple of 4, such as {fewer} or {more}"
            )
        return frames // self.time_compression + 1

    def encode(self, x: Tensor) -> Tensor:
        """Means, then log variances (B, 2 C, t, H / 8, W / 8) of clips (B, 3, T, H, W), or of pictures (B, 3, H, W)
        without t. They are not scaled, and not clamped.

        Raises ValueError: see `latent_frames`; or sides are no multiples of 8.
        """
        if x.dim() == 4:
            return self.encode(x[:, :, None])[:, :, 0]
        self.latent_frames(x.shape[2])
        if x.shape[3] % self.compression or x.shape[4] % self.compression:
            raise ValueError(f"clips of {x.shape[3]} x {x.shape[4]}: sides are multiples of {self.compression}")
        tiles = [self.quant_conv(self.encoder(tile)) for tile in tiles_in_time(x, FRAMES)]
        return joined(tiles)

    def decode(self, z: Tensor) -> Tensor:
        """Clips (B, 3, 4 t - 3, H, W) of unscaled latents (B, C, t, H / 8, W / 8), or pictures without t."""
        if z.dim() == 4:
            return self.decode(z[:, :, None])[:, :, 0]
        return joined([self.decoder(self.post_quant_conv(tile)) for tile in tiles_in_time(z, LATENTS)])

    def scaled(self, latents: Tensor) -> Tensor:
        """As the transformer sees them."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return latents / self.scaling_factor + self.shift_factor


def tiles_in_time(x: Tensor, size: int) -> list[Tensor]:
    """Tiles (B, C, up to `size`, H, W) of (B, C, T, H, W), each but the first beginning with the end of the one
    before."""
    starts = range(0, max(x.shape[2] - 1, 1), size - 1)
    return [x[:, :, start : start + size] for start in starts]


def joined(tiles: Sequence[Tensor]) -> Tensor:
    """Tiles in time, of each but the first without its first frame."""
    return torch.cat([tiles[0], *(tile[:, :, 1:] for tile in tiles[1:])], dim=2)


RENAMED = (
    (r"\.down\.(\d)\.", r".down_blocks.\1."),
    (r"\.up\.(\d)\.", lambda match: f".up_blocks.{3 - int(match[1])}."),
    (r"\.block\.(\d)\.", r".resnets.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.([qkv])\.", r".attentions.0.to_\1."),
    (r"\.attentions\.0\.proj_out\.", ".attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
)
"""From the names of Open-Sora-Plan 1.2's CausalVAE, in this order."""


def is_open_sora_plan(names: Sequence[str] | Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of Open-Sora-Plan 1.2."""
    return any(".mid.block_1." in name for name in names)


def from_open_sora_plan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Open-Sora-Plan 1.2's CausalVAE, with the names and shapes of this network."""
    found = {}
    for old, tensor in state.items():
        name = old
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(?<!samplers\.0)\.conv\.(weight|bias)$", r".\1", name)  # inside of its causal convolutions
        in_attention = ".attentions." in name and tensor.dim() > 2
        found[name] = tensor.flatten(1) if in_attention else tensor
    return found
