"""Train an encoder for Stage C's latents together with the previewer that makes small pictures of them.

    python3 train/train_encoder.py configs/training/mini_encoder.yaml

The encoder squeezes a picture into 16 numbers per patch; what the previewer cannot rebuild from them, no Stage C can
draw. A little noise on the latents keeps neighbouring ones meaningful, as Stage C will not hit them exactly.
"""

import warpcore.openmp

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from families.cascade import build
from families.cascade.config import FamilySettings
from families.cascade.training import CascadeTraining
from families.common.pictures import to_pictures, to_uint8
from modules.effnet import normalise_images
from warpcore.config import Config
from warpcore.data.reader import Batch
from warpcore.keys import Weights
from warpcore.random import SampleRandom
from warpcore.results import Losses, Sampled, per_sample


class EncoderConfig(FamilySettings, Config):
    unused = frozenset({"captions_getter"})

    effnet_checkpoint_path: Weights | None = None
    """Weights of the encoder to start from; random ones without it."""
    previewer_checkpoint_path: Weights | None = None
    """Weights of the previewer to start from; random ones without it."""
    latent_noise: NonNegativeFloat = 0.1
    """Deviation of the noise added to the latents, whose own deviation is about 1."""
    squared_weight: NonNegativeFloat = 10.0
    """Weight of the squared error, beside the absolute error."""
    coarse_weight: NonNegativeFloat = 20.0
    """Weight of the squared errors of the picture at 1/2, 1/4 and 1/8 of its size: learns what is where, fast."""
    edge_weight: NonNegativeFloat = 1.0
    """Weight of the error of differences between neighbouring pixels: keeps outlines sharp."""
    sample_count: PositiveInt = 16
    """How many held-out pictures are drawn at most, beside their reconstructions."""


class TrainEncoder(CascadeTraining):
    Config = EncoderConfig
    trainable = {"encoder": {}, "previewer": {}}
    needs_captions = False

    def build(self) -> dict[str, nn.Module]:
        config = self.config
        return {
            "encoder": build.encoder(config, from_scratch=config.effnet_checkpoint_path is None),
            "previewer": build.previewer(config, from_scratch=config.previewer_checkpoint_path is None),
        }

    def encode(self, batch: Batch, random: SampleRandom) -> Tensor:
        return batch.images.float() / 255

    def loss(self, pictures: Tensor, random: SampleRandom) -> Losses:
        latents = self.networks["encoder"](normalise_images(pictures))
        noise = random.normal("latent noise", *latents.shape[1:]) * self.config.latent_noise
        rebuilt = self.networks["previewer"](latents + noise).float()
        wanted = F.interpolate(pictures, rebuilt.shape[2:], mode="area")
        error, config = rebuilt - wanted, self.config
        squared = per_sample(error.square())
        coarse = sum(per_sample(F.avg_pool2d(error, n).square()) for n in (2, 4, 8))
        edges = per_sample(error.diff(dim=2).abs()) + per_sample(error.diff(dim=3).abs())
        loss = per_sample(error.abs()) + config.squared_weight * squared
        return Losses(loss + config.coarse_weight * coarse + config.edge_weight * edges, squared)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {
            "effnet_encoder": self.networks["encoder"].state_dict(),
            "previewer": self.networks["previewer"].state_dict(),
        }

    def sample(self, held_out: Batch) -> list[Sampled]:
        images = held_out.images[: self.config.sample_count].to(self.device)
        rebuilt = self.networks["previewer"](self.networks["encoder"](normalise_images(images.float() / 255)))
        columns = {"picture": to_uint8(images), "rebuilt": to_pictures(rebuilt, held_out.size)}
        return Sampled.rows(held_out.captions[: len(images)], columns)


if __name__ == "__main__":
    TrainEncoder.main()
