"""An AutoencoderKLWan of diffusers that is trained: its beginning, and whole clips at once.

The library goes through a clip in pieces of four frames and remembers what its convolutions need of the piece before.
Here the same convolutions see all frames together, which gives the same numbers in a fraction of the calls, and does
not clamp colours, so that every pixel has a gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from families.common.autoencoder_training import FIRST_LOG_VARIANCE, LibraryAutoencoder
from families.common.wan_autoencoder import LIBRARY_CLASS, TIME_COMPRESSION, check_frames
from warpcore.meta import are_only_shapes

TIME_LEVELS = 2
"""How many of the halvings of the sides, the last ones, also halve the number of frames."""


class TrainedWanAutoencoder(LibraryAutoencoder):
    """An AutoencoderKLWan whose `forward` is what training needs of it.

    Levels of activation checkpointing: 3 computes the residual blocks again in the backward pass; 1 and 2 keep all, as
    no block has attention.
    """

    class_name = LIBRARY_CLASS

    def __init__(self, model: nn.Module):
        """
        Args:
            model: diffusers' AutoencoderKLWan, that of Wan 2.1; adapted to the engine in place.
        """
        super().__init__(model, blocks=("WanResidualBlock",))

    @property
    def latent_channels(self) -> int:
        return self.model.config.z_dim

    @property
    def compression(self) -> int:
        """Pixels per latent position and side."""
        return self.model.config.scale_factor_spatial

    def latent_shape(self, clips: torch.Size) -> tuple[int, ...]:
        """(C, t, h, w) of clips (B, T, 3, H, W). Raises UserError for a T that is not 1 + 4 n."""
        _, frames, _, height, width = clips
        check_frames(frames, "num_frames")
        side = self.compression
        return self.latent_channels, 1 + (frames - 1) // TIME_COMPRESSION, height // side, width // side

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuild clips (B, T, 3, H, W) in [0, 1] from latents drawn with noise (B, C, t, h, w), or from their means.

        Returns:
            Clips like those given, not clamped; the latents (B, C, t, h, w); and (B,) the Kullback-Leibler divergence
            of their distribution from standard normal in nats. All are float32.
        """
        mean, log_variance = self.encode(clips.transpose(1, 2) * 2 - 1).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
        rebuilt = self.decode(latents).float()
        return rebuilt.transpose(1, 2) / 2 + 0.5, latents, divergence

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and log variance (B, 2 C, t, h, w) of pixels (B, 3, T, H, W) in [-1, 1]."""
        encoder, side = self.model.encoder, self.model.config.patch_size or 1
        hidden = encoder.conv_in(_to_patches(pixels, side))
        for layer in encoder.down_blocks:
            hidden = _fewer(layer, hidden) if hasattr(layer, "resample") else layer(hidden)
        hidden = encoder.norm_out(encoder.mid_block(hidden))
        return self.model.quant_conv(encoder.conv_out(encoder.nonlinearity(hidden)))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W), about in [-1, 1], of latents (B, C, t, h, w)."""
        decoder, side = self.model.decoder, self.model.config.patch_size or 1
        hidden = decoder.mid_block(decoder.conv_in(self.model.post_quant_conv(latents)))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                hidden = layer(hidden)
            for layer in block.upsamplers or ():
                hidden = _more(layer, hidden)
        hidden = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
        return _from_patches(hidden, side)


def _fewer(layer: nn.Module, x: Tensor) -> Tensor:
    """Half the sides of (B, C, T, H, W), and half of the frames after the first, which stays by itself."""
    x = _each_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _more(layer: nn.Module, x: Tensor) -> Tensor:
    """Twice the sides of (B, C, T, H, W), and twice the frames after the first."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, T - 1, H, W)
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    return _each_frame(layer.resample, x)


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of pictures on the frames of (B, C, T, H, W)."""
    frames = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _to_patches(x: Tensor, side: int) -> Tensor:
    """Squares of `side` px as channels, in the library's order: (B, C, T, H, W) -> (B, C side^2, T, h, w)."""
    squares = x.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # (B, C, T, h, y, w, x)
    return squares.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _from_patches(x: Tensor, side: int) -> Tensor:
    """The inverse of `_to_patches`."""
    squares = x.unflatten(1, (-1, side, side))  # (B, C, x, y, T, h, w)
    return squares.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def from_scratch(
    base_dim: int, dim_mult: Sequence[int], num_res_blocks: int, z_dim: int, patch_size: int
) -> nn.Module:
    """A new AutoencoderKLWan; the numbers are those of its constructor. Its latents will be scaled to 1."""
    from diffusers import AutoencoderKLWan

    halvings = len(dim_mult) - 1
    model = AutoencoderKLWan(
        base_dim=base_dim,
        dim_mult=list(dim_mult),
        num_res_blocks=num_res_blocks,
        z_dim=z_dim,
        temperal_downsample=[level >= halvings - TIME_LEVELS for level in range(halvings)],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        in_channels=3 * patch_size**2,
        out_channels=3 * patch_size**2,
        patch_size=patch_size if patch_size > 1 else None,
        scale_factor_temporal=TIME_COMPRESSION,
        scale_factor_spatial=patch_size * 2**halvings,
    )
    if not are_only_shapes():
        initialise(model)
    return model


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Let a new AutoencoderKLWan begin as a chain of plain convolutions through which signals keep their size, and
    that shows each frame twice where it doubles their number.

    As with pictures, it learns colours several times sooner than with PyTorch's defaults.
    """
    for name, part in model.named_modules():
        if not isinstance(part, nn.Conv2d | nn.Conv3d):
            continue
        if name.endswith((".conv2", ".proj")):  # a residual block, and one of attention, begins as the identity
            part.weight.zero_()
            part.bias.zero_()
        elif name.startswith("decoder.") and name.endswith(".time_conv"):
            twice = torch.eye(part.in_channels).repeat(2, 1)
            part.weight[:, :, -1, 0, 0] += twice  # the tap of the frame itself; PyTorch's noise tells the two apart
            part.bias.zero_()
        elif not name.endswith((".conv1", ".conv_out")):  # PyTorch draws variances of 1 / (3 inputs)
            part.weight.mul_(math.sqrt(3))
            part.bias.zero_()
    for part in (model.encoder, model.decoder):
        # Norms of single positions forget how large a signal is, unless it stands beside something constant.
        part.conv_in.bias.normal_()
    _, log_variance = model.quant_conv.weight.chunk(2)
    log_variance.mul_(0.1)
    model.quant_conv.bias.chunk(2)[1].fill_(FIRST_LOG_VARIANCE)
