"""An AutoencoderKL of diffusers that is trained, and its beginning."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from families.common.autoencoder_training import FIRST_LOG_VARIANCE, LibraryAutoencoder
from warpcore.meta import are_only_shapes


class TrainedAutoencoder(LibraryAutoencoder):
    """An AutoencoderKL whose `forward` is what training needs of it.

    Levels of activation checkpointing: 3 computes the residual blocks, and the discriminator's layers, again in the
    backward pass; 1 and 2 keep all, as no block has attention.
    """

    def __init__(self, model: nn.Module, decoder_only: bool = False):
        """
        Args:
            model: diffusers' AutoencoderKL; adapted to the engine in place.
            decoder_only: freeze the encoder, so that pictures keep their latents.
        """
        super().__init__(model)
        if decoder_only:
            frozen = (self.model.encoder, self.model.quant_conv)
            for part in filter(None, frozen):
                part.requires_grad_(False)

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    @property
    def compression(self) -> int:
        """Pixels per latent position and side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def latent_shape(self, pictures: torch.Size) -> tuple[int, ...]:
        """(C, h, w) of pictures (B, 3, H, W)."""
        return self.latent_channels, *(side // self.compression for side in pictures[2:])

    def forward(self, pictures: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuild pictures (B, 3, H, W) in [0, 1] from latents drawn with noise (B, C, h, w), or from their means.

        Returns:
            Pictures like those given, not clamped; the latents (B, C, h, w); and (B,) the Kullback-Leibler divergence
            of their distribution from standard normal in nats. All are float32.
        """
        posterior = self.model.encode(pictures * 2 - 1).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))
        rebuilt = self.model.decode(latents).sample.float()
        return rebuilt / 2 + 0.5, latents, divergence


def from_scratch(
    block_out_channels: Sequence[int],
    layers_per_block: int,
    latent_channels: int,
    norm_num_groups: int,
    mid_block_attention: bool,
    sample_size: int,
) -> nn.Module:
    """A new AutoencoderKL; the numbers are those of its constructor. Its latents will be scaled to 1."""
    from diffusers import AutoencoderKL

    levels = len(block_out_channels)
    model = AutoencoderKL(
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=mid_block_attention,
        sample_size=sample_size,
        scaling_factor=1.0,
    )
    if not are_only_shapes():
        initialise(model)
    return model


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Let a new AutoencoderKL begin as a chain of plain convolutions through which signals keep their size.

    It learns colours several times sooner than with PyTorch's defaults, which shrink a signal at every level.
    """
    parts = dict(model.named_modules())
    for name, part in parts.items():
        if not isinstance(part, nn.Conv2d):
            continue
        if name.endswith(".conv2"):  # a residual block begins as the identity
            part.weight.zero_()
            part.bias.zero_()
        elif not name.endswith((".conv1", ".conv_out")):  # PyTorch draws variances of 1 / (3 inputs)
            part.weight.mul_(math.sqrt(3))
            part.bias.zero_()
    _, log_variance = model.quant_conv.weight.chunk(2)
    log_variance.mul_(0.1)
    model.quant_conv.bias.chunk(2)[1].fill_(FIRST_LOG_VARIANCE)
