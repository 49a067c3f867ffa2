"""The autoencoders whose latents Open-Sora draws: that of 1.2, an AutoencoderKLWan for its mini, and those of 1.0 and
1.1, which see frame by frame.

All make clips, uint8 (B, T, 3, H, W), into moments (B, 2 C, t, H / 8, W / 8), and latents (B, C, t, h, w) into clips;
a picture is a clip of one frame. Each is found by what its file or folder holds.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
from families.common.wan_autoencoder import LIBRARY_CLASS, TIME_COMPRESSION, WanAutoencoder, read_wan_tensors
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import local_weights
from families.common.weights import WeightsError, read_weights
from families.open_sora.config import OpenSoraSettings
from families.open_sora.frame_autoencoders import PUBLISHED_OF_FRAMES, FrameClips, TemporallyDecoded
from families.open_sora.versions import FLOW
from modules.open_sora_vae import SCALE, SHIFT, OpenSoraAutoencoder, TemporalAutoencoder
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.random import SampleRandom
from warpcore.text import brief
from warpcore.transfer import to_device

WINDOW = 17
"""Frames that the published autoencoder encodes and decodes independently of others."""


class ClipAutoencoder(Protocol):
    """What a training, or a drawing, needs of an autoencoder of clips."""

    scale: LatentScale
    compression: int
    """Pixels per latent position and side."""
    latent_channels: int
    align: int | None
    """Latent frames of a window, which are independent of others; None where all of a clip depend on those before."""

    def latent_frames(self, frames: int) -> int:
        """t, of a clip of T frames. Raises UserError for a number that it does not take."""

    def frames_of(self, latent_frames: int) -> int:
        """T, the most frames that this number of latent ones may stand for; 1 of a single one."""

    def clip_moments(self, clips: Tensor, random: SampleRandom | None) -> Tensor:
        """Moments (B, 2 C, t, h, w) float32 of clips (B, T, 3, H, W) uint8.

        random: draws what comes between two networks, where there are two; None takes means.
        """

    def decoded_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        """`decoded_clips` in pieces (B, some of T, 3, H, W), so that not all have to be in memory."""

    def decoded_clips(self, latents: Tensor, frames: int) -> Tensor:
        """Clips (B, T, 3, H, W) float32 in [0, 1] of scaled latents and their number of frames T."""


class OpenSoraClips(FrozenNetwork):
    """The frozen autoencoder of Open-Sora 1.2, in its own precision.

    Args:
        config: `spatial`, constructor numbers of diffusers' AutoencoderKL, `temporal`, those of
            `modules.open_sora_vae.TemporalAutoencoder`, and `shift` and `scale` of the latents' channels; what is not
            there is as published.
        frames_at_once: frames that pass the spatial part at a time.
        key: the config key that an error names.
    """

    forward_methods = ("clip_moments", "decoded_clips", "decoded_windows")

    def __init__(self, config: Mapping[str, Any], precision: str = "float32", frames_at_once: int = 4,
                 key: str = AUTOENCODER):  # fmt: skip
        super().__init__()
        from diffusers import AutoencoderKL

        spatial = construct(AutoencoderKL, SD_AUTOENCODER | _part(config, "spatial", key), key)
        temporal = construct(TemporalAutoencoder, _part(config, "temporal", key), key)
        self.scale = self.scale_of(config)
        self.model = OpenSoraAutoencoder(
            spatial, temporal, WINDOW, frames_at_once, shift=self.scale.mean, scale=self.scale.std
        )
        self.key, self.spatial_channels = key, spatial.config.latent_channels
        self.compression = Autoencoder.compression_of(spatial.config)
        self.latent_channels = len(self.scale.mean)
        self.align = self.latent_frames(WINDOW)
        freeze(self.model.eval(), precision, key)

    def latent_frames(self, frames: int) -> int:
        return self.model.latent_frames(frames)

    def frames_of(self, latent_frames: int) -> int:
        in_window = self.latent_frames(WINDOW)
        windows, rest = divmod(latent_frames, in_window)
        return 1 if latent_frames == 1 else windows * WINDOW + rest * self.model.temporal_vae.compression

    @staticmethod
    def scale_of(config: Mapping[str, Any]) -> LatentScale:
        """The scale of its latents, by a config as the constructor takes it."""
        mean, std = (config.get(name) or list(given) for name, given in (("shift", SHIFT), ("scale", SCALE)))
        channels = len(mean) if isinstance(mean, list | tuple) else None
        return LatentScale.of(
            {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0, "latent_channels": channels}
        )

    @staticmethod
    def compression_of(config: Mapping[str, Any]) -> int:
        """Pixels per latent position and side."""
        return Autoencoder.compression_of(SD_AUTOENCODER | _part(config, "spatial", AUTOENCODER))

    @staticmethod
    def channels_of(config: Mapping[str, Any]) -> int:
        """C."""
        return len(OpenSoraClips.scale_of(config).mean)

    @torch.no_grad()
    def clip_moments(self, clips: Tensor, random: SampleRandom | None) -> Tensor:
        check_sides(clips, self.compression, self.key)
        frames, _, *sides = clips.shape[1:]
        shape = self.spatial_channels, frames, *(side // self.compression for side in sides)
        dtype = self.model.shift.dtype
        noise = None if random is None else random.normal("spatial latent", *shape).to(dtype)
        pixels = to_device(clips, self.device).to(dtype) / 127.5 - 1
        with self.in_own_precision():
            return self.model.moments(pixels.transpose(1, 2), noise).float()

    forward = clip_moments

    @torch.no_grad()
    def decoded_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        own = to_device(latents, self.device).to(self.model.shift.dtype)
        with self.in_own_precision():
            for window in self.model.decode_windows(own, frames):
                yield (window.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def decoded_clips(self, latents: Tensor, frames: int) -> Tensor:
        return torch.cat(list(self.decoded_windows(latents, frames)), dim=1)


class WanClips(WanAutoencoder):
    """A frozen AutoencoderKLWan, in its own precision. Clips have 1 + 4 n frames, and are one window."""

    align = None
    forward_methods = ("clip_moments", "decoded_clips", "decoded_windows")

    def latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // TIME_COMPRESSION

    def frames_of(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * TIME_COMPRESSION

    def clip_moments(self, clips: Tensor, random: SampleRandom | None) -> Tensor:
        return self.moments(clips)

    def decoded_clips(self, latents: Tensor, frames: int) -> Tensor:
        if (made := self.frames_of(latents.shape[2])) != frames:
            raise ValueError(f"latents of {latents.shape[2]} frames cannot be decoded to {frames}, but to {made}")
        return self.decode(latents)

    def decoded_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        yield self.decoded_clips(latents, frames)


def check_sides(clips: Tensor, compression: int, key: str) -> None:
    """Raise UserError for clips (..., H, W) with a side that `compression` does not divide."""
    height, width = clips.shape[-2:]
    if height % compression or width % compression:
        raise UserError(f"{key}: a clip of {width} x {height} px; sides have to be multiples of {compression}")


def _part(config: Mapping[str, Any], name: str, key: str) -> dict[str, Any]:
    """The constructor numbers of one of the two networks."""
    found = config.get(name, {})
    if not isinstance(found, Mapping):
        raise UserError(f"{key}: its config says {name}: {brief(found)}; write the numbers of that network by name")
    return dict(found)


# ---------------------------------------------------------------- where it is


def autoencoder(settings: OpenSoraSettings) -> ClipAutoencoder:
    """The autoencoder, in its own precision.

    Raises:
        UserError: it is missing, damaged, or makes other latents than the network reads.
    """
    path, (kind, config) = autoencoder_source(settings), autoencoder_numbers(settings)
    made, wanted = kind.channels_of(config), settings.version.network["in_channels"]
    if made != wanted:
        raise WeightsError(
            f"{AUTOENCODER}: latents of {path} have {brief(made)} channels, and the network of model_version: "
            f"{settings.model_version} reads {wanted}: name the autoencoder that it was trained with"
        )
    precision, at_once = settings.autoencoder_precision, settings.autoencoder_frames
    if kind is OpenSoraClips:
        return _open_sora(config, path, precision, at_once)
    read = read_wan_tensors if kind is WanClips else read_tensors
    further = {} if kind is WanClips else {"frames_at_once": at_once}
    return kind.of(config, partial(read, path, AUTOENCODER), path, AUTOENCODER, precision=precision, **further)


def _open_sora(config: Mapping[str, Any], path: Path, precision: str, frames_at_once: int) -> OpenSoraClips:
    with torch.device("meta"):
        made = OpenSoraClips(config, precision, frames_at_once)
    if are_only_shapes():
        return made
    tensors = read_tensors(path, AUTOENCODER) if path.is_dir() else read_weights(path, AUTOENCODER)
    fill(made.model, tensors, path, AUTOENCODER, next(made.parameters()).dtype)
    for name, wanted in {"shift": made.scale.mean, "scale": made.scale.std}.items():
        found = tensors[name].flatten().tolist()
        if max(abs(here - there) for here, there in zip(found, wanted, strict=True)) > 1e-5:
            raise WeightsError(f"{AUTOENCODER}: {path}: {name} is {found}, and its config says {list(wanted)}")
    made.model.requires_grad_(False)
    return made


def autoencoder_source(settings: OpenSoraSettings) -> Path:
    """The file or folder of the autoencoder; what is only on the hub is downloaded, but for shapes alone."""
    given = settings.autoencoder_checkpoint_path or Path(settings.version.autoencoder)
    return component_folder(given if are_only_shapes() else local_weights(given, AUTOENCODER), "vae")


def autoencoder_numbers(settings: OpenSoraSettings) -> tuple[type[nn.Module], Mapping[str, Any]]:
    """The class of the autoencoder, and its config; its weights are not read."""
    path = autoencoder_source(settings)
    found = _config_in(path) if path.exists() or not are_only_shapes() else None
    named = class_names(found or {})
    kinds = {LIBRARY_CLASS: WanClips, "AutoencoderKL": FrameClips, "AutoencoderKLTemporalDecoder": TemporallyDecoded}
    if kind := next((kind for name, kind in kinds.items() if name in named), None):
        return kind, found
    if "spatial" in (found or {}) or settings.version.target == FLOW:
        return OpenSoraClips, found or {}
    return FrameClips, found or PUBLISHED_OF_FRAMES


def _config_in(path: Path) -> Mapping[str, Any] | None:
    """What a folder, or a safetensors file, says of the autoencoder in it. A published `.pt` says nothing."""
    return read_config(path, AUTOENCODER) if path.is_dir() or path.suffix == ".safetensors" else None


def latents_of(settings: OpenSoraSettings) -> tuple[LatentScale, int]:
    """The scale of the autoencoder's latents, and the pixels per position and side; its weights are not read."""
    kind, config = autoencoder_numbers(settings)
    return kind.scale_of(config), kind.compression_of(config)


def autoencoder_files(settings: OpenSoraSettings) -> list[Path]:
    """What cached moments depend on: its weights, and its config."""
    place = autoencoder_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]
