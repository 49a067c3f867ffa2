"""What says how good an autoencoder's reconstruction is, for the training scripts of all autoencoders.

Pixels, a perceptual distance where its weights are given, and from `discriminator_start` on a patch discriminator
(VQGAN, arXiv:2012.09841).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from families.common.weight_source import with_local_weights
from families.common.weights import with_weights
from modules.discriminator import PatchDiscriminator
from modules.perceptual import PerceptualDistance
from warpcore.config import Config, Settings
from warpcore.core import WarpCore
from warpcore.data.reader import Batch
from warpcore.idle_keys import Need
from warpcore.keys import Weights
from warpcore.random import SampleRandom
from warpcore.results import per_sample

BLOCK_PX = 8
"""Side of the squares whose means `means_weight` compares."""


class ReconstructionKeys(Settings):
    """What says how good a reconstruction is."""

    needs = {
        "perceptual_weight": Need.of("perceptual_checkpoint_path"),
        **dict.fromkeys(("discriminator_start", "discriminator_channels"), Need.of("discriminator_weight")),
    }

    squared_weight: NonNegativeFloat = 1.0
    """Weight of the squared error, beside the absolute error."""
    means_weight: NonNegativeFloat = 0.0
    """Weight of the absolute error of the means of squares of 8 x 8 px: small autoencoders learn colours sooner."""
    perceptual_checkpoint_path: Weights | None = None
    """Weights of torchvision's VGG-16 (vgg16-397923af.pth or .safetensors) for a perceptual distance."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of that distance."""
    discriminator_weight: NonNegativeFloat = 0.1
    """Size of the discriminator's gradient on a picture, beside that of the other losses; 0 for no discriminator."""
    discriminator_start: NonNegativeInt = 10_000
    """The update from which the discriminator learns, and teaches."""
    discriminator_channels: Annotated[int, Field(gt=0, multiple_of=4, le=8192)] = 64
    """Channels of its first layer."""
    sample_count: PositiveInt = 16
    """How many held-out pictures are drawn at most, beside their reconstructions."""


class ReconstructionConfig(ReconstructionKeys, Config):
    """Keys of a script that trains an autoencoder."""

    unused = frozenset({"captions_getter"})


class ReconstructionTraining(WarpCore):
    """Trains an autoencoder of pictures (B, 3, H, W) in [0, 1]."""

    config: ReconstructionConfig
    needs_captions = False

    def __init__(self, config: ReconstructionConfig):
        super().__init__(with_local_weights(config))

    def encode(self, batch: Batch, random: SampleRandom) -> Tensor:
        return batch.images.float() / 255

    def judges(self) -> dict[str, nn.Module]:
        """The networks that judge reconstructions: `discriminator`, which is trained, and `perceptual`."""
        config, networks = self.config, {}
        if config.discriminator_weight:
            networks["discriminator"] = PatchDiscriminator(config.discriminator_channels)
        if (path := config.perceptual_checkpoint_path) is not None:
            networks["perceptual"] = with_weights(PerceptualDistance, path, "perceptual_checkpoint_path", only=True)
        return networks

    def reconstruction_loss(self, rebuilt: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """How far pictures (B, 3, H, W) float32 in [0, 1] are from what they should be: the loss, and the squared
        error, both (B,)."""
        config = self.config
        error = rebuilt - pictures
        squared = per_sample(error.square())
        loss = per_sample(error.abs()) + config.squared_weight * squared
        if config.means_weight:
            loss = loss + config.means_weight * per_sample(F.avg_pool2d(error, BLOCK_PX).abs())
        if "perceptual" in self.networks:
            loss = loss + config.perceptual_weight * self.networks["perceptual"](rebuilt, pictures)
        return loss, squared

    def with_discriminator(self, loss: Tensor, rebuilt: Tensor, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) of pictures (B, 3, H, W) with the discriminator's, from `discriminator_start` on, and metrics.

        The discriminator adds its loss for the autoencoder and, as hinge loss (arXiv:1705.02894), that for itself. Its
        gradient on each picture is scaled to `discriminator_weight` of the other losses' there. (VQGAN compares
        gradients on the last layer's weights, which would depend on the other pictures of the batch.)
        """
        config = self.config
        if not config.discriminator_weight or self.update < config.discriminator_start:
            return loss, {}
        discriminator = self.networks["discriminator"]
        fake = rebuilt.detach().requires_grad_()
        score = discriminator(fake).float()
        (adversarial_gradient,) = torch.autograd.grad(-score.sum(), fake, retain_graph=True)
        (other,) = torch.autograd.grad(loss.sum(), rebuilt, retain_graph=True)
        scale = config.discriminator_weight * _norm(other) / (_norm(adversarial_gradient) + 1e-12)
        adversarial = (rebuilt * (adversarial_gradient * scale)).sum(dim=(1, 2, 3))  # its gradient is all that matters
        hinge = per_sample((1 + score).relu()) + per_sample((1 - discriminator(pictures).float()).relu())
        hinge = hinge / 2
        return loss + (adversarial - adversarial.detach()) + hinge, {"discriminator_loss": hinge}


def _norm(gradients: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, 1, 1)."""
    return gradients.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
