"""What the trainings of autoencoders whose latents a diffusion model learns have in common."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from families.common.family import RECONSTRUCTION
from families.common.library_files import CONFIG_KEY, constructor_numbers
from families.common.library_networks import adapt
from families.common.next_commands import drawing_commands
from families.common.pictures import image_metrics, to_pictures, to_uint8
from families.common.reconstruction_losses import ReconstructionConfig, ReconstructionTraining
from modules.autocast import without_autocast
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom
from warpcore.results import Losses, Sampled

FIRST_LOG_VARIANCE = -6.0
"""Of the latents of an autoencoder from scratch: at first, hardly any noise hides what its decoder learns from."""
SCALE_DECAY = 0.99
"""Decay of the running statistics of latents, per update."""
LEAST_DEVIATION = 0.15
"""Directions of latents with less of the mean deviation are not raised to 1 when latents are whitened."""


class AutoencoderConfig(ReconstructionConfig):
    """Keys of a script that trains such an autoencoder."""

    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the Kullback-Leibler divergence: nats of a picture's latents, for each of its pixels' values."""


class AutoencoderTraining(ReconstructionTraining):
    """Trains `autoencoder` on pictures (B, 3, H, W), or on clips (B, T, 3, H, W), in [0, 1].

    The losses of a clip are the means of those of its frames. A subclass builds the network.
    """

    config: AutoencoderConfig
    latents: "LatentStatistics"
    about_autoencoder: dict[str, str]

    def with_judges(self, autoencoder: nn.Module) -> dict[str, nn.Module]:
        """The networks of the training, for `build`."""
        self.latents = LatentStatistics(autoencoder.latent_channels).to(self.device)
        self.bookkeeping["latents"] = self.latents
        networks = {"autoencoder": autoencoder} | self.judges()
        self.trainable = {name: {} for name in networks if name != "perceptual"}
        self.about_autoencoder = autoencoder.metadata_to_save()
        return networks

    @property
    def bucket_factor(self) -> int:
        return self.networks["autoencoder"].compression

    def loss(self, given: Tensor, random: SampleRandom) -> Losses:
        autoencoder, drawn = self.networks["autoencoder"], torch.is_grad_enabled()
        noise = random.normal("latent", *autoencoder.latent_shape(given.shape)) if drawn else None
        rebuilt, latents, divergence = autoencoder(given, noise)
        divergence = divergence / given[0].numel()
        pictures, made = given.flatten(0, -4), rebuilt.flatten(0, -4)  # frames of clips are pictures
        if drawn:
            loss, squared = self.reconstruction_loss(made, pictures)
            loss, metrics = self.with_discriminator(loss, made, pictures)
        else:
            loss = squared = (made - pictures).square().mean(dim=(1, 2, 3))
            metrics = image_metrics(made, pictures)
        each = {name: values.unflatten(0, (len(given), -1)).mean(dim=1) for name, values in metrics.items()}
        loss, squared = (values.unflatten(0, (len(given), -1)).mean(dim=1) for values in (loss, squared))
        if not drawn:
            return Losses(squared, squared, metrics=each | {"kl": divergence})
        loss = loss + self.config.kl_weight * divergence
        return Losses(loss, squared, LatentStatistics.of(latents.detach()), each | {"kl": divergence})

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.latents.step(**statistics)

    def next_commands(self) -> list[str]:
        return drawing_commands(RECONSTRUCTION, self.config, pictures="FOLDER")

    def file_metadata(self) -> dict[str, str]:
        return self.about_autoencoder

    def sample(self, held_out: Batch) -> list[Sampled]:
        images = held_out.images[: self.config.sample_count].to(self.device)
        rebuilt, *_ = self.networks["autoencoder"](images.float() / 255)
        columns = {"picture" if images.ndim == 4 else "clip": to_uint8(images), "rebuilt": to_pictures(rebuilt)}
        rates = held_out.columns.get("fps", torch.zeros(1))  # of clips; they move together in one sheet
        return Sampled.rows(held_out.captions[: len(images)], columns, float(rates.cpu().max()) or Sampled.fps)


class LibraryAutoencoder(nn.Module):
    """An autoencoder of diffusers as training wants it: adapted to the engine, with its config beside its weights."""

    class_name: str | None = None
    """What the config says of its class, where readers have to know it."""

    def __init__(self, model: nn.Module, **options: Any):
        """
        Args:
            model: adapted in place; everything is trained.
            options: of `families.common.library_networks.adapt`.
        """
        super().__init__()
        self.model = adapt(model.requires_grad_(True), **options)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def set_activation_checkpointing(self, level: int) -> None:
        """Compute the residual blocks again in the backward pass from level 3 on."""
        self.model.set_activation_checkpointing(level)

    def compile_blocks(self, graphs: bool = False) -> None:
        """Let `torch.compile` fuse what the residual blocks compute; see `LibraryNetwork.compile_blocks`."""
        self.model.compile_blocks(graphs)

    def metadata_to_save(self) -> dict[str, str]:
        """The config, as metadata of a safetensors file: `Autoencoder.load` reads it there."""
        name = {} if self.class_name is None else {"_class_name": self.class_name}
        return {CONFIG_KEY: json.dumps(name | constructor_numbers(self.model.config))}


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
        """What `step` wants to know of latents (B, C, ...): (B, C) and (B, C, C) by name."""
        flat = latents.flatten(2).float()
        with without_autocast(flat.device):  # covariances are small differences of these products
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
    all of the variance, and what tells a star from a circle is learned slowly. The convolutions of size 1 around the
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
    back = around["post_quant_conv.weight"]
    changed = {
        "quant_conv.weight": torch.cat([(matrix @ weight.flatten(1)).view_as(weight), more]),
        "quant_conv.bias": torch.cat([matrix @ (of_mean - mean), of_log_variance + matrix.square().sum(1).log()]),
        "post_quant_conv.weight": (back.flatten(1) @ matrix.inverse()).view_as(back),
        "post_quant_conv.bias": around["post_quant_conv.bias"] + back.flatten(1) @ mean,
    }
    return state | {name: tensor.to(state[name]) for name, tensor in changed.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
