"""diffusers' AutoencoderKLWan, the autoencoder of Wan 2.1 and of Cosmos-Predict2, on clips and on pictures, which are
clips of one frame."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families.common.autoencoders import Autoencoder, LatentScale
from families.common.library_files import read_tensors
from families.common.weights import read_weights
from warpcore.errors import UserError
from warpcore.text import brief

LIBRARY_CLASS = "AutoencoderKLWan"
CONSTRUCTOR = {
    "z_dim": 16, "scale_factor_spatial": 8,
    "latents_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latents_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    ],
}  # fmt: skip
"""Of the published network; what is not here is the library's default."""
TIME_COMPRESSION = 4
"""Frames per latent frame, after the first, which has its own."""
COMPRESSIONS = [2**levels for levels in range(11)]


class WanAutoencoder(Autoencoder):
    """A frozen AutoencoderKLWan in its own precision.

    Pictures (B, 3, H, W) have latents (B, C, h, w); clips (B, T, 3, H, W) of T = 1 + 4 n frames have latents
    (B, C, 1 + n, h, w).
    """

    time_compression = TIME_COMPRESSION

    @staticmethod
    def library_class() -> type[nn.Module]:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan

    @staticmethod
    def scale_of(config: Mapping[str, Any]) -> LatentScale:
        given = CONSTRUCTOR | dict(config)
        return LatentScale.of(given | {"scaling_factor": 1.0, "latent_channels": given["z_dim"]})

    @staticmethod
    def compression_of(config: Mapping[str, Any]) -> int:
        said = (CONSTRUCTOR | dict(config))["scale_factor_spatial"]
        if said not in COMPRESSIONS:
            raise UserError(f"scale_factor_spatial in the autoencoder's config is {brief(said)}; write a power of two")
        return said

    @staticmethod
    def channels_of(config: Mapping[str, Any]) -> int:
        return (CONSTRUCTOR | dict(config))["z_dim"]

    def _encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim == 4:
            return self._moments(pixels[:, :, None])[:, :, 0]
        check_frames(pixels.shape[1], self.key)
        return self._moments(pixels.transpose(1, 2))

    def _moments(self, pixels: Tensor) -> Tensor:
        """Of (B, 3, T, H, W), the library's order."""
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        if latents.ndim == 4:
            return self.model.decode(latents[:, :, None]).sample[:, :, 0]
        return self.model.decode(latents).sample.transpose(1, 2)


def check_frames(frames: int, key: str) -> None:
    """Raises UserError for a number of frames of which the network would drop the last ones: not 1 + 4 n."""
    if (frames - 1) % TIME_COMPRESSION:
        lower = frames - (frames - 1) % TIME_COMPRESSION
        raise UserError(
            f"{key}: clips of {frames} frames; this autoencoder takes 1 + a multiple of {TIME_COMPRESSION}, such as "
            f"{lower} or {lower + TIME_COMPRESSION}"
        )


def read_wan_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The weights in a folder of diffusers, or in a file of its names or of the published ones (`tokenizer.pth`).

    Raises:
        UserError: they are missing, or cannot be read.
    """
    if path.is_dir():
        return read_tensors(path, key)
    tensors = read_weights(path, key)
    if "encoder.conv1.weight" not in tensors:
        return tensors
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(tensors)
