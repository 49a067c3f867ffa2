"""The frozen autoencoder of NOVA's clips, in its own precision, out of a published folder or file.

It is written as `AutoencoderKLOpenSora`, or with the names of Open-Sora-Plan 1.2. That of pictures is an AutoencoderKL
of diffusers: `families/common/autoencoders.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.autoencoders import LatentScale
from families.common.library_files import component_folder, construct, fill, read_config
from families.common.precision import FrozenNetwork, freeze
from families.common.weight_files import AUTOENCODER
from families.common.weights import read_weights
from families.nova.files import folder_tensors
from modules.open_sora_plan_vae import OpenSoraPlanAutoencoder, from_open_sora_plan, is_open_sora_plan
from warpcore.errors import UserError
from warpcore.transfer import to_device

PART = "vae"
"""The folder of the network in a pipeline's."""
LOG_VARIANCES = -30.0, 20.0
"""The least and the largest one of stored moments, as training has it."""


class NovaClips(FrozenNetwork):
    """Clips, uint8 (B, T, 3, H, W), to moments (B, 2 C, t, H / 8, W / 8), and latents to clips.

    Args:
        config: constructor numbers of `OpenSoraPlanAutoencoder`; what is not there is as published.
        key: the config key that an error names.
    """

    forward_methods = ("clip_moments", "decoded_clips")

    def __init__(self, config: Mapping[str, Any], precision: str = "float32", key: str = AUTOENCODER):
        super().__init__()
        self.model = construct(OpenSoraPlanAutoencoder, config, key)
        self.scale = LatentScale.of(config)
        self.key, self.compression = key, self.model.compression
        self.latent_channels = config.get("latent_channels", 4)
        freeze(self.model.eval(), precision, key)

    @classmethod
    def read(cls, path: Path, precision: str = "float32", key: str = AUTOENCODER) -> "NovaClips":
        """That of a folder, a pipeline's folder or a file. Raises UserError where it is missing or of another
        network."""
        path = component_folder(path, PART)
        config = (read_config(path, key) if path.is_dir() or path.suffix == ".safetensors" else None) or {}
        tensors = folder_tensors(path, key) if path.is_dir() else read_weights(path, key)
        if is_open_sora_plan(tensors):
            tensors, config = from_open_sora_plan(tensors), {}  # that program's config has other keys
        with torch.device("meta"):
            made = cls(config, precision, key)
        fill(made.model, tensors, path, key, next(made.parameters()).dtype)
        made.model.requires_grad_(False)
        return made

    def latent_frames(self, frames: int) -> int:
        """t, of a clip of T frames. Raises UserError where T is not 4 n + 1."""
        try:
            return self.model.latent_frames(frames)
        except ValueError as error:
            raise UserError(f"{self.key}: {error}") from None

    def frames_of(self, latent_frames: int) -> int:
        """T, of so many latent frames."""
        return 1 + (latent_frames - 1) * self.model.time_compression

    @torch.no_grad()
    def clip_moments(self, clips: Tensor) -> Tensor:
        """Moments (B, 2 C, t, h, w) float32. Raises UserError for sides that are no multiples of 8."""
        height, width = clips.shape[-2:]
        if height % self.compression or width % self.compression:
            said = f"sides have to be multiples of {self.compression}"
            raise UserError(f"{self.key}: a clip of {width} x {height} px; {said}")
        self.latent_frames(clips.shape[1])
        pixels = to_device(clips, self.device).to(self._dtype) / 127.5 - 1
        with self.in_own_precision():
            mean, log_variance = self.model.encode(pixels.transpose(1, 2)).float().chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCES)], dim=1)

    forward = clip_moments

    @torch.no_grad()
    def decoded_clips(self, latents: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W) float32 in [0, 1] of scaled latents (B, C, t, h, w)."""
        own = self.scale.undo(to_device(latents, self.device).float()).to(self._dtype)
        with self.in_own_precision():
            clips = self.model.decode(own)
        return (clips.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
