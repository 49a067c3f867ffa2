"""Train a DiT: the transformer that draws the latents of an autoencoder for a class, such as one of ImageNet's.

    python3 train/train_dit.py configs/training/quickstart_dit.yaml
    torchrun --nproc-per-node 8 train/train_dit.py configs/training/dit_xl2_256.yaml

Each sample has a class: the number in its `.cls`, or what `class_getter` makes of another member. Latents are drawn
from moments, which are computed, or read from a cache (tools/cache.py); a cache has the classes too. The run's folder
gets `generator.safetensors` with the published names; tools/export.py makes a published file of it.
"""

import warpcore.openmp
import json
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from families.common.library_files import CONFIG_KEY
from families.common.pictures import to_pictures, to_uint8
from families.common.sampling import draw_latents
from families.common.techniques.transformer import TransformerTechniques
from families.dit import build
from families.dit.classes import ClassField, class_conditions, title_of
from families.dit.config import DitConfig
from families.dit.training import LatentTraining, latent_shape
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom, stable_hash

CLASS = "class"
"""What a batch calls the classes of its samples."""


class TrainDit(TransformerTechniques, LatentTraining):
    Config = DitConfig
    family = "dit"
    needs_captions = False

    def __init__(self, config: DitConfig):
        super().__init__(config)
        self.class_field = ClassField.parse(config.class_getter, config.num_classes, config.class_names)

    def build(self) -> dict[str, nn.Module]:
        return self.with_techniques(build.dit(self.config, self.size_px)) | self.needed_encoders()

    def sample_fields(self, from_cache: bool) -> dict:
        return super().sample_fields(from_cache) | {CLASS: self.class_field}

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor]:
        labels, dropped = batch.extra[CLASS], random.uniform("class dropout") < self.config.class_dropout
        empty = labels.new_full((), self.config.num_classes)  # the last row of the network's table
        return self.latents_of(batch, random), torch.where(dropped, empty, labels)

    def loss(self, inputs: tuple[Tensor, Tensor], random: SampleRandom) -> Losses:
        latents, labels = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], y=labels))

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_classes

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config, count, shown = self.config, self.config.sample_count, {}
        if held_out is None:
            labels, size = config.sample_numbers[:count], self.size_px
        else:
            labels, size = held_out.extra[CLASS][:count].cpu().tolist(), held_out.size
        if held_out is not None and held_out.images is not None:
            shown = {"picture": to_uint8(held_out.images[:count])}
        drawn = self.draw(labels, size)
        return Sampled.rows([title_of(label, config.class_names) for label in labels], shown | {"sample": drawn})

    def draw(self, labels: list[int], size: tuple[int, int]) -> np.ndarray:
        """Drawings, uint8 (B, H, W, 3) of `size` (H, W), of classes."""
        config, autoencoder = self.config, self.networks["autoencoder"]
        latents = draw_latents(
            self.diffusion, self.networks["generator"],
            *class_conditions(labels, config.num_classes, self.device),
            latent_shape(size, autoencoder.latent_channels, autoencoder.compression),
            [stable_hash(config.seed, "sample", i) for i in range(len(labels))],
            steps=config.sample_steps, sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_rescale=0.0, guidance_channels=config.guided_channels(config.sample_sampler),
        )  # fmt: skip
        return to_pictures(autoencoder.decode(latents))

    def file_metadata(self) -> dict[str, str]:
        numbers = build.network_numbers(self.config, self.size_px)
        return super().file_metadata() | {CONFIG_KEY: json.dumps(numbers)}


if __name__ == "__main__":
    TrainDit.main()
