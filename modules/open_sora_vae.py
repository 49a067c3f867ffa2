"""The autoencoder of Open-Sora 1.2: each frame to latents of a picture, then those of 17 frames to 5 in time.

The spatial part is diffusers' AutoencoderKL, whoever makes it; the temporal network, of causal convolutions, is here.
Constructor arguments, parameter names and shapes are those of the published file. Activations are (B, C, T, H, W).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Block, compile_blocks, set_activation_checkpointing

SPATIAL_SCALE = 0.18215
"""Of the spatial latents, though their autoencoder is SDXL's: the temporal network learned with it."""
SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
"""Mean and deviation of the channels of the published latents."""
LEAST_LOG_VARIANCE, LARGEST_LOG_VARIANCE = -30.0, 20.0


class CausalConv(nn.Module):
    """A convolution of which a frame sees itself and earlier ones; outside there are zeros.

    stride: in time. Each output frame then stands for as many, and sees none after them.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1, bias: bool = True):
        super().__init__()
        around = kernel_size // 2
        self.conv = nn.Conv3d(c_in, c_out, kernel_size, (stride, 1, 1), padding=(0, around, around), bias=bias)
        self.in_front = kernel_size - stride

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, self.in_front, 0)))


class TemporalResBlock(Block):
    """Two normed convolutions beside the input, which a third brings to another width."""

    wide = True

    def __init__(self, c_in: int, c_out: int, num_groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(num_groups, c_in), nn.GroupNorm(num_groups, c_out)
        self.conv1, self.conv2 = CausalConv(c_in, c_out, bias=False), CausalConv(c_out, c_out, bias=False)
        self.conv3 = CausalConv(c_in, c_out, kernel_size=1, bias=False) if c_in != c_out else nn.Identity()

    def compute(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(hidden)))


def _res_blocks(c_in: int, c_out: int, count: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(TemporalResBlock(c_out if i else c_in, c_out, num_groups) for i in range(count))


class TemporalEncoder(nn.Module):
    """(B, C, T, H, W) -> (B, 2 C_latent, T / compression, H, W)."""

    def __init__(
        self, c_in: int, c_out: int, widths: Sequence[int], halved: Sequence[bool], num_res_blocks: int, groups: int
    ):
        super().__init__()
        self.conv_in = CausalConv(c_in, widths[0], bias=False)
        before = [widths[0], *widths[:-1]]
        pairs = zip(before, widths, strict=True)
        self.block_res_blocks = nn.ModuleList(_res_blocks(*pair, num_res_blocks, groups) for pair in pairs)
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, width, stride=2) if halves else nn.Identity()
            for width, halves in zip(widths[:-1], halved, strict=True)
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], num_res_blocks, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv(widths[-1], c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            if level:
                x = self.conv_blocks[level - 1](x)
            for block in blocks:
                x = block(x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(nn.Module):
    """(B, C_latent, T, H, W) -> (B, C, T * compression, H, W)."""

    def __init__(
        self, c_in: int, c_out: int, widths: Sequence[int], doubled: Sequence[bool], num_res_blocks: int, groups: int
    ):
        super().__init__()
        self.conv1 = CausalConv(c_in, widths[-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1], num_res_blocks, groups)
        pairs = zip([*widths[1:], widths[-1]], widths, strict=True)
        self.block_res_blocks = nn.ModuleList(_res_blocks(*pair, num_res_blocks, groups) for pair in pairs)
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width) if doubles else nn.Identity()
            for width, doubles in zip(widths[1:], doubled, strict=True)
        )
        self.doubled = tuple(doubled)
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv(widths[0], c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            if level and self.doubled[level - 1]:
                both = self.conv_blocks[level - 1](x).unflatten(1, (-1, 2))  # (B, C, 2, T, H, W)
                x = both.transpose(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalAutoencoder(nn.Module):
    """Latents of frames to fewer, and back. The defaults are the published network.

    Args:
        in_out_channels: C of the frames' latents. latent_embed_dim, embed_dim: before and after the last layer.
        filters, channel_multipliers: the width of each level. temporal_downsample: whether time is halved between.
        num_res_blocks: of each level. num_groups: of each norm.
    """

    forward_methods = ("encode", "decode")

    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ):
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample: {len(temporal_downsample)} given; write one for each of the "
                f"{len(channel_multipliers) - 1} steps between levels"
            )
        widths = [filters * multiplier for multiplier in channel_multipliers]
        built = widths, temporal_downsample, num_res_blocks, num_groups
        self.compression = 2 ** sum(temporal_downsample)
        self.encoder = TemporalEncoder(in_out_channels, 2 * latent_embed_dim, *built)
        self.quant_conv = CausalConv(2 * latent_embed_dim, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = CausalConv(embed_dim, latent_embed_dim, kernel_size=1)
        self.decoder = TemporalDecoder(latent_embed_dim, in_out_channels, *built)

    @property
    def blocks(self) -> list[TemporalResBlock]:
        return [module for module in self.modules() if isinstance(module, TemporalResBlock)]

    def set_activation_checkpointing(self, level: int) -> None:
        """1: every second block; 2 and 3: every block."""
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(self.blocks, graphs)

    def latent_frames(self, frames: int) -> int:
        """Frames of the latents of `frames`."""
        return -(-frames // self.compression)

    def encode(self, x: Tensor) -> Tensor:
        """Mean, then log variance (B, 2 C, t, H, W) of (B, C, T, H, W).

        Zeros in front fill up the number of frames, so the first latent of 4 n + 1 frames is of one frame. Log
        variances are clamped to [-30, 20].
        """
        moments = self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.compression, 0))))
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(LEAST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)], dim=1)

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """(B, C, T, H, W) of latents (B, C, t, H, W) and their number of frames T.

        Raises ValueError for latents of another number of frames.
        """
        _check_frames(z, frames, self.latent_frames(frames))
        return self.decoder(self.post_quant_conv(z))[:, :, -frames:]


class OpenSoraAutoencoder(nn.Module):
    """Clips in [-1, 1] (B, 3, T, H, W) to latents (B, C, t, H / 8, W / 8), about standard normal, and back.

    Args:
        spatial: diffusers' AutoencoderKL, or what has its `encode` and `decode`.
        temporal: its channels are those of the spatial latents.
        micro_frame_size: frames of a window; windows are independent. None: the whole clip is one.
        micro_batch_size: frames that pass the spatial part at a time.
    """

    forward_methods = ("moments", "decode", "decode_windows")

    def __init__(
        self,
        spatial: nn.Module,
        temporal: TemporalAutoencoder,
        micro_frame_size: int | None = 17,
        micro_batch_size: int = 4,
        shift: Sequence[float] = SHIFT,
        scale: Sequence[float] = SCALE,
    ):
        super().__init__()
        self.spatial_vae = nn.ModuleDict({"module": spatial})
        self.temporal_vae = temporal
        self.micro_frame_size, self.micro_batch_size = micro_frame_size, micro_batch_size
        for name, values in {"shift": shift, "scale": scale}.items():
            self.register_buffer(name, torch.tensor(values)[None, :, None, None, None])

    def windows(self, frames: int) -> list[int]:
        """Frames of each window of a clip."""
        size = self.micro_frame_size or frames
        return [min(size, frames - start) for start in range(0, frames, size)]

    def latent_frames(self, frames: int) -> int:
        """t, of a clip of T frames: 5 for each 17, and of what is left one for each 4, rounded up."""
        return sum(map(self.temporal_vae.latent_frames, self.windows(frames)))

    def moments(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean, then log variance (B, 2 C, t, h, w) of the temporal latents, not yet scaled.

        noise: (B, C, T, h, w) standard normal, which draws the spatial latents that they are of; None: of their means.
        """
        frames = clips.transpose(1, 2)  # (B, T, 3, H, W)
        found = [self._spatial_moments(some) for some in frames.flatten(0, 1).split(self.micro_batch_size)]
        moments = torch.cat(found).unflatten(0, frames.shape[:2]).transpose(1, 2)
        latents = SPATIAL_SCALE * drawn(moments, noise)
        windows = latents.split(self.windows(latents.shape[2]), dim=2)
        return torch.cat([self.temporal_vae.encode(window) for window in windows], dim=2)

    def _spatial_moments(self, frames: Tensor) -> Tensor:
        posterior = self.spatial_vae["module"].encode(frames).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, t, h, w) of `moments`, drawn by `noise` of their shape; None: the means."""
        return (drawn(moments, noise) - self.shift) / self.scale

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Clips (B, 3, T, H, W), about in [-1, 1], of scaled latents and their number of frames T.

        Raises ValueError for latents of another number of frames.
        """
        return torch.cat(list(self.decode_windows(latents, frames)), dim=2)

    def decode_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        """`decode` window by window, so that no more than one has to be in memory."""
        _check_frames(latents, frames, self.latent_frames(frames))
        windows = self.windows(frames)
        cut = (latents * self.scale + self.shift).split(list(map(self.temporal_vae.latent_frames, windows)), dim=2)
        return (self._decoded(*each) for each in zip(cut, windows, strict=True))

    def _decoded(self, latents: Tensor, frames: int) -> Tensor:
        pictures = (self.temporal_vae.decode(latents, frames) / SPATIAL_SCALE).transpose(1, 2)
        some = pictures.flatten(0, 1).split(self.micro_batch_size)
        found = torch.cat([self.spatial_vae["module"].decode(each).sample for each in some])
        return found.unflatten(0, pictures.shape[:2]).transpose(1, 2)


def _check_frames(latents: Tensor, frames: int, wanted: int) -> None:
    if latents.shape[2] != wanted:
        said = f"{frames} frames have {wanted} latents in time"
        raise ValueError(f"latents of {latents.shape[2]} frames cannot be decoded to {frames}: {said}")


def drawn(moments: Tensor, noise: Tensor | None) -> Tensor:
    """Latents (B, C, ...) of moments (B, 2 C, ...), with noise of their shape; the mean without."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean if noise is None else mean + (0.5 * log_variance).exp() * noise
