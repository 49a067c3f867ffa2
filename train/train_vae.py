"""Train an autoencoder (AutoencoderKL of diffusers) from scratch, or finetune one or its decoder alone.

    python3 train/train_vae.py configs/training/mini_vae.yaml

Pixels, a perceptual distance where its weights are given, and from `discriminator_start` on a patch discriminator say
how good a reconstruction is; the Kullback-Leibler divergence keeps latents near standard normal (arXiv:2112.10752).
The run's folder gets `autoencoder.safetensors` with diffusers' names, and its config inside.
"""

import warpcore.openmp
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from families.common.pictures import image_metrics, to_pictures, to_uint8
from families.common.reconstruction_losses import ReconstructionConfig, ReconstructionTraining
from families.common.weight_files import FAMILY_KEY
from families.stable_diffusion.autoencoder_training import (
    LatentStatistics,
    TrainedAutoencoder,
    from_scratch,
    whitened_weights,
)
from families.stable_diffusion.build import autoencoder_by_itself
from warpcore.data.buckets import whole_size
from warpcore.data.reader import Batch
from warpcore.keys import Weights
from warpcore.random import SampleRandom
from warpcore.results import Losses, Sampled

SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "mid_block_attention")
"""Keys that say how a new autoencoder is built."""


Channels = Annotated[int, Field(gt=0, le=8192)]


class VaeConfig(ReconstructionConfig):
    autoencoder_checkpoint_path: Weights | None = None
    """Autoencoder to start from: a folder of diffusers, a pipeline, a checkpoint in one file, or a file of its own; a
    new one without it. It keeps its `scaling_factor`, as denoisers of its latents were trained with that."""
    autoencoder_version: Literal["sd15", "sdxl"] | None = None
    """Whose autoencoder it is, where its file does not say it: they differ in their `scaling_factor`."""
    decoder_only: bool = False
    """Train the decoder alone: pictures keep their latents, so denoisers and caches of them stay valid."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the Kullback-Leibler divergence: nats of a picture's latents, for each of its pixels' values."""
    block_out_channels: list[Channels] = Field([128, 256, 512, 512], min_length=1, max_length=12)
    """Channels of a new autoencoder's levels; each after the first halves the sides."""
    layers_per_block: Annotated[int, Field(gt=0, le=100)] = 2
    """Residual blocks of each level of its encoder; its decoder has one more."""
    latent_channels: Channels = 4
    """Channels of its latents."""
    norm_num_groups: PositiveInt = 32
    """Groups of its norms; divides every number of channels."""
    mid_block_attention: bool = True
    """Attention between all positions of the latents."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.autoencoder_checkpoint_path is None:
            if self.decoder_only:
                raise ValueError("decoder_only needs the encoder's weights: give autoencoder_checkpoint_path")
            if self.autoencoder_version is not None:
                raise ValueError(
                    "autoencoder_version says which autoencoder a file holds: give autoencoder_checkpoint_path"
                )
            if odd := [n for n in self.block_out_channels if n % self.norm_num_groups]:
                raise ValueError(
                    f"norm_num_groups: {self.norm_num_groups} does not divide block_out_channels {odd[0]}"
                )
        return self


class TrainVae(ReconstructionTraining):
    Config = VaeConfig

    def build(self) -> dict[str, nn.Module]:
        config, path = self.config, self.config.autoencoder_checkpoint_path
        if path is None:
            sizes = {key: getattr(config, key) for key in SIZES}
            model = from_scratch(**sizes, sample_size=max(whole_size(config.image_size)))
        else:
            model = autoencoder_by_itself(path, config.autoencoder_version).model
        autoencoder = TrainedAutoencoder(model, config.decoder_only)
        self.latents = LatentStatistics(autoencoder.latent_channels).to(self.device)
        self.bookkeeping["latents"] = self.latents
        networks = {"autoencoder": autoencoder} | self.judges()
        self.trainable = {name: {} for name in networks if name != "perceptual"}
        self.about_autoencoder = autoencoder.metadata_to_save()
        return networks

    @property
    def bucket_factor(self) -> int:
        return self.networks["autoencoder"].compression

    def loss(self, pictures: Tensor, random: SampleRandom) -> Losses:
        autoencoder, (height, width) = self.networks["autoencoder"], pictures.shape[2:]
        drawn, side = torch.is_grad_enabled(), autoencoder.compression
        shape = (autoencoder.latent_channels, height // side, width // side)
        rebuilt, latents, divergence = autoencoder(pictures, random.normal("latent", *shape) if drawn else None)
        divergence = divergence / pictures[0].numel()
        if not drawn:
            squared = (rebuilt - pictures).square().mean(dim=(1, 2, 3))
            return Losses(squared, squared, metrics=image_metrics(rebuilt, pictures) | {"kl": divergence})
        loss, squared = self.reconstruction_loss(rebuilt, pictures)
        loss, metrics = self.with_discriminator(loss, rebuilt, pictures)
        loss = loss + self.config.kl_weight * divergence
        return Losses(loss, squared, LatentStatistics.of(latents.detach()), metrics | {"kl": divergence})

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.latents.step(**statistics)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        model, is_new = self.networks["autoencoder"].model, self.config.autoencoder_checkpoint_path is None
        return {"autoencoder": whitened_weights(model, self.latents) if is_new else model.state_dict()}

    def file_metadata(self) -> dict[str, str]:
        return self.about_autoencoder | {FAMILY_KEY: "stable_diffusion"}

    def sample(self, held_out: Batch) -> list[Sampled]:
        images = held_out.images[: self.config.sample_count].to(self.device)
        rebuilt, *_ = self.networks["autoencoder"](images.float() / 255)
        columns = {"picture": to_uint8(images), "rebuilt": to_pictures(rebuilt)}
        return Sampled.rows(held_out.captions[: len(images)], columns)


if __name__ == "__main__":
    TrainVae.main()
