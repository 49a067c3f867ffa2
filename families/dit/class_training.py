"""What training scripts of networks that draw classes share: the loss, and drawing."""

import json
from functools import partial

from torch import Tensor

from families.common.beginning import check_family
from families.common.class_training import ClassSamples
from families.common.classes import label_tensors
from families.common.library_files import CONFIG_KEY
from families.common.sampling import draw_latents, sample_seeds
from families.common.weight_files import GENERATOR
from families.dit import build
from families.dit.config import ClassConfig
from families.dit.files import dit_numbers
from families.dit.training import LatentTraining, latent_shape
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class ClassTraining(ClassSamples, LatentTraining):
    """Trains a DiT or a Latte; a script builds it, and draws samples with it."""

    config: ClassConfig

    def check_start(self) -> None:
        check_family(self.config, self.family)
        path = self.config.generator_checkpoint_path
        if path is not None and path.exists():
            build.check_network(dit_numbers(path, GENERATOR), self.config)

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor]:
        return self.latents_of(batch, random), self.labels(batch, random)

    def loss(self, inputs: tuple[Tensor, Tensor], random: SampleRandom) -> Losses:
        latents, labels = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], y=labels))

    def draw_latents(self, labels: list[int], size: tuple[int, ...]) -> Tensor:
        """Scaled latents (B, C, h, w) of classes for pictures of (H, W) px, or (B, C, T, h, w) for clips (T, H, W)."""
        config, autoencoder = self.config, self.networks["autoencoder"]
        return draw_latents(
            self.diffusion, self.networks["generator"],
            *({"y": one} for one in label_tensors(labels, config.num_classes, self.device)),
            latent_shape(size, autoencoder.latent_channels, autoencoder.compression),
            sample_seeds(config.seed, len(labels)),
            steps=config.sample_steps, sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_rescale=0.0, guidance_channels=config.guided_channels(config.sample_sampler),
        )  # fmt: skip

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | {CONFIG_KEY: json.dumps(build.network_numbers(self.config, self.size_px))}
