"""An AutoencoderKL of diffusers that is trained: its beginning, and the scale of its latents."""

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from families.common.library_files import CONFIG_KEY, constructor_numbers
from families.common.library_networks import adapt
from families.common.weights import are_only_shapes

FIRST_LOG_VARIANCE = -6.0
"""Of the latents of an autoencoder from scratch: at first, hardly any noise hides what its decoder learns from."""
SCALE_DECAY = 0.99
"""Decay of the running statistics of latents, per update."""
LEAST_DEVIATION = 0.15
"""Directions of latents with less of the mean deviation are not raised to 1 when latents are whitened."""


class TrainedAutoencoder(nn.Module):
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
        super().__init__()
        self.model = adapt(model.requires_grad_(True))
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

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def set_activation_checkpointing(self, level: int) -> None:
        self.model.set_activation_checkpointing(level)

    def compile_blocks(self, graphs: bool = False) -> None:
        self.model.compile_blocks(graphs)

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

    def metadata_to_save(self) -> dict[str, str]:
        """The config, as metadata of a safetensors file: `Autoencoder.load` reads it there."""
        return {CONFIG_KEY: json.dumps(constructor_numbers(self.model.config))}


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


class LatentStatistics(nn.Module):
    """Running mean, and mean products of the channels, of the latents over the updates of a run."""

    mean: Tensor
    products: Tensor
    updates: Tensor

    def __init__(self, channels: int):
        super().__init__()
        for name, shape in {"mean": (channels,), "products": (channels, channels), "updates": ()}.items():
            self.register_buffer(name, torch.zeros(shape))

    @staticmethod
    def of(latents: Tensor) -> dict[str, Tensor]:
        """What `step` wants to know of latents (B, C, h, w): (B, C) and (B, C, C) by name."""
        flat = latents.flatten(2)
        return {"mean": flat.mean(dim=2), "products": flat @ flat.mT / flat.shape[2]}

    @torch.no_grad()
    def step(self, mean: Tensor, products: Tensor) -> None:
        """Take in the statistics (B, C) and (B, C, C) of an update's samples."""
        self.updates += 1
        taken = (1 / self.updates).clamp(min=1 - SCALE_DECAY)  # of the first updates, the plain mean
        self.mean.lerp_(mean.mean(dim=0).to(self.mean), taken)
        self.products.lerp_(products.mean(dim=0).to(self.products), taken)

    def whitening(self) -> Tensor:
        """The symmetric matrix (C, C) after which channels are uncorrelated, of deviation 1 on average (ZCA whitening:
        Kessy et al., arXiv:1512.00809). What hardly varies is noise, and isn't raised to 1: see `LEAST_DEVIATION`."""
        mean, products = self.mean.cpu().double(), self.products.cpu().double()  # not every device has float64
        variances, directions = torch.linalg.eigh(products - mean.outer(mean))
        variances = variances.clamp(min=1e-12)
        scales = (variances + LEAST_DEVIATION**2 * variances.mean()).rsqrt()
        scales = scales / (variances * scales.square()).mean().sqrt()
        return (directions * scales) @ directions.mT


def whitened_weights(model: nn.Module, statistics: LatentStatistics) -> dict[str, Tensor]:
    """The weights of the same autoencoder with latents of mean 0 and deviation 1, whose channels are uncorrelated.

    A diffusion model weighs all channels alike: left as they come, a few directions (brightness, colour) hold nearly
    all of the variance, and what tells a star from a circle is learned slowly. The convolutions of 1 x 1 around the
    latents take the matrix in, so that every program that reads one `scaling_factor` (here 1) has it. The noise of
    latents is scaled by channel, as if it were equal in all.
    """
    state = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    if not statistics.updates:
        return state
    matrix = statistics.whitening()
    mean = statistics.mean.cpu().double()
    around = {name: tensor.cpu().double() for name, tensor in state.items() if "quant_conv" in name}
    of_mean, of_log_variance = around["quant_conv.bias"].chunk(2)
    weight, more = around["quant_conv.weight"].chunk(2)
    back = around["post_quant_conv.weight"][..., 0, 0]
    changed = {
        "quant_conv.weight": torch.cat([(matrix @ weight[..., 0, 0])[..., None, None], more]),
        "quant_conv.bias": torch.cat([matrix @ (of_mean - mean), of_log_variance + matrix.square().sum(1).log()]),
        "post_quant_conv.weight": (back @ matrix.inverse())[..., None, None],
        "post_quant_conv.bias": around["post_quant_conv.bias"] + back @ mean,
    }
    return state | {name: tensor.to(state[name]) for name, tensor in changed.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
