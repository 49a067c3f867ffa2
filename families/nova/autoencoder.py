"""The frozen autoencoders whose latents NOVA draws, in their own precision, out of folders or files.

Published networks of clips have `AutoencoderKLOpenSora`, also with the names of Open-Sora-Plan 1.2, those of pictures
an AutoencoderKL, and the mini of clips an AutoencoderKLWan. All make clips, uint8 (B, T, 3, H, W), into moments
(B, 2 C, t, h, w), and latents (B, C, t, h, w) into clips; a picture is a clip of one frame.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.autoencoders import SD_AUTOENCODER, Autoencoder, LatentScale
from families.common.library_files import (
    CONFIG,
    class_names,
    component_folder,
    construct,
    fill,
    read_config,
    read_tensors,
)
from families.common.precision import FrozenNetwork, freeze
from families.common.wan_autoencoder import (
    LIBRARY_CLASS,
    TIME_COMPRESSION,
    WanAutoencoder,
    check_frames,
    read_wan_tensors,
)
from families.common.weight_files import AUTOENCODER
from families.common.weights import WeightsError, read_weights
from families.nova.components import part_of
from families.nova.config import NovaSettings
from families.nova.files import folder_tensors
from modules.open_sora_plan_vae import OpenSoraPlanAutoencoder, from_open_sora_plan, is_open_sora_plan
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.text import brief
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
        """The frames T that a number of latent frames stands for."""
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


class PictureClips(Autoencoder):
    """A frozen AutoencoderKL: it takes clips of one frame."""

    forward_methods = ("clip_moments", "decoded_clips")

    def latent_frames(self, frames: int) -> int:
        """1. Raises UserError for more frames."""
        if frames != 1:
            raise UserError(f"{self.key}: clips of {frames} frames, but this autoencoder takes pictures: name another")
        return 1

    def frames_of(self, latent_frames: int) -> int:
        return latent_frames

    def clip_moments(self, clips: Tensor) -> Tensor:
        self.latent_frames(clips.shape[1])
        return self.moments(clips[:, 0])[:, :, None]

    def decoded_clips(self, latents: Tensor) -> Tensor:
        return self.decode(latents[:, :, 0])[:, None]


class WanClips(WanAutoencoder):
    """A frozen AutoencoderKLWan, on clips of 1 + 4 n frames."""

    forward_methods = ("clip_moments", "decoded_clips")

    def latent_frames(self, frames: int) -> int:
        check_frames(frames, self.key)
        return 1 + (frames - 1) // TIME_COMPRESSION

    def frames_of(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * TIME_COMPRESSION

    def clip_moments(self, clips: Tensor) -> Tensor:
        return self.moments(clips)

    def decoded_clips(self, latents: Tensor) -> Tensor:
        return self.decode(latents)


# ---------------------------------------------------------------- where it is

ClipAutoencoder = NovaClips | PictureClips | WanClips
OPEN_SORA_PLAN = "CausalVAEModel"
"""The class of the same autoencoder in the folders of Open-Sora-Plan."""
PUBLISHED_PICTURES = SD_AUTOENCODER | {"scaling_factor": 0.18215, "force_upcast": False}
"""Constructor numbers of AutoencoderKL where only shapes are wanted and nothing says them."""


def autoencoder(settings: NovaSettings) -> ClipAutoencoder:
    """The autoencoder, in its own precision.

    Raises:
        UserError: it is missing, damaged, or makes other latents than the network reads.
    """
    path, (kind, config) = autoencoder_source(settings), autoencoder_numbers(settings)
    made, wanted = _channels(kind, config), settings.version.network["image_dim"]
    if made != wanted:
        raise WeightsError(
            f"{AUTOENCODER}: latents of {path} have {brief(made)} channels, and the network of model_version: "
            f"{settings.model_version} reads {wanted}: name the autoencoder that it was trained with"
        )
    if kind is NovaClips:
        if not are_only_shapes():
            return NovaClips.read(path, settings.autoencoder_precision)
        with torch.device("meta"):
            return NovaClips(config, settings.autoencoder_precision)
    read = partial(read_wan_tensors if kind is WanClips else read_tensors, path, AUTOENCODER)
    return kind.of(config, read, path, AUTOENCODER, precision=settings.autoencoder_precision)


def autoencoder_source(settings: NovaSettings) -> Path:
    """The file or folder of the autoencoder; what is only on the hub is downloaded, but for shapes alone."""
    return part_of(settings, AUTOENCODER, PART)


def autoencoder_numbers(settings: NovaSettings) -> tuple[type[ClipAutoencoder], Mapping[str, Any]]:
    """The class of the autoencoder, and its config; its weights are not read.

    Raises:
        UserError: it is missing, or a file of pictures does not say how it is built.
    """
    path = autoencoder_source(settings)
    found = _config_in(path) if path.exists() or not are_only_shapes() else None
    config = found or {}
    if LIBRARY_CLASS in (named := class_names(config)):
        return WanClips, config
    if OPEN_SORA_PLAN in named:
        return NovaClips, {}  # that program's config has other keys
    of_clips = any("3D" in str(one) for one in config.get("down_block_types") or ())
    if of_clips or (found is None and settings.version.draws_clips):
        return NovaClips, config
    if found is None and path.exists():
        raise WeightsError(f"{AUTOENCODER}: {path} does not say which autoencoder it is: name a folder of diffusers")
    return PictureClips, config or PUBLISHED_PICTURES


def latents_of(settings: NovaSettings) -> tuple[LatentScale, int]:
    """The scale of the autoencoder's latents, and the pixels per position and side; its weights are not read."""
    kind, config = autoencoder_numbers(settings)
    if kind is NovaClips:
        return LatentScale.of(config), OpenSoraPlanAutoencoder.compression
    return kind.scale_of(config), kind.compression_of(config)


def autoencoder_files(settings: NovaSettings) -> list[Path]:
    """What cached moments depend on: its weights, and its config."""
    place = autoencoder_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]


def _channels(kind: type[ClipAutoencoder], config: Mapping[str, Any]) -> int:
    return config.get("latent_channels", 4) if kind is NovaClips else kind.channels_of(config)


def _config_in(path: Path) -> Mapping[str, Any] | None:
    """What a folder, or a safetensors file, says of the autoencoder in it."""
    return read_config(path, AUTOENCODER) if path.is_dir() or path.suffix == ".safetensors" else None
