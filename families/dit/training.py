"""What training scripts of DiT and of PixArt share: moments of an autoencoder, and the diffusion process."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.cache import Shape
from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.training import DiffusionTraining
from families.dit import build
from families.dit.autoencoder import autoencoder, autoencoder_files, latents_of
from warpcore.data.buckets import whole_size
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom


class LatentTraining(DiffusionTraining):
    """Trains a denoiser of the latents of an AutoencoderKL, of which caches hold the moments.

    A subclass says its `family`, builds the network, and adds what steers it to `encoders` and `features`.
    """

    config: Any
    drawn_with = frozenset({"autoencoder"})

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return build.process(self.config, loss_weight, self.config.offset_noise)

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return {"autoencoder": partial(autoencoder, self.config)}

    def network_files(self, network: str) -> list[Path]:
        return autoencoder_files(self.config)

    @property
    def features(self) -> dict[str, Feature]:
        return {"moments": Feature("autoencoder", PICTURE_SETTINGS)} | self.mask_feature("autoencoder")

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        moments = self.networks["autoencoder"].moments(batch.images)
        return {"moments": moments} | self.mask_of_pictures(batch, moments)

    def read_shape(self, name: str) -> Shape | None:
        return (2 * self.config.version.network["in_channels"], None, None) if name == "moments" else None

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return latents_of(self.config)

    @property
    def bucket_factor(self) -> int:
        return self.latents[1] * self.config.version.network["patch_size"]

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures for which the network has positions."""
        return whole_size(self.config.image_size)

    def latents_of(self, batch: Batch, random: SampleRandom) -> Tensor:
        """Scaled latents (B, C, H, W) float32 of a batch, drawn for each sample, or the means."""
        moments = stored(batch, "moments")
        moments = self.picture_features(batch, random)["moments"] if moments is None else moments
        return self.latents[0].latents(moments, random if self.config.latent == "sample" else None)


def latent_shape(size: Sequence[int], channels: int, compression: int) -> tuple[int, ...]:
    """(C, h, w) of the latents of a picture of `size` (H, W) px, or (C, T, h, w) of a clip of (T, H, W)."""
    return channels, *size[:-2], *(side // compression for side in size[-2:])
