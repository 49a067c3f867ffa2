"""diffusers' AutoencoderKL: pictures to moments, latents to pictures. Kingma and Welling, arXiv:1312.6114.

A cache stores moments, not latents, so that each draw of a sample has its own latent. `LatentScale` alone turns them
into latents: a run from caches needs no autoencoder for it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from families.common.library_files import (
    component_folder,
    construct,
    fill,
    read_config,
    read_tensors,
    said_config,
)
from families.common.precision import FrozenNetwork, freeze
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.random import SampleRandom
from warpcore.text import brief
from warpcore.transfer import to_device

Latent = Literal["sample", "mean"]
"""What of the moments a latent is: drawn for each sample, or the mean."""
MAX_LEVELS = 10
"""Of an autoencoder; each halves the sides of a picture."""
SD_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
"""Constructor numbers of the autoencoders of Stable Diffusion, SDXL and DiT; their weights and scales differ."""
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention layers in folders written before 2023."""


@dataclass(frozen=True)
class LatentScale:
    """What makes the latents of an autoencoder about standard normal: (z - mean) / std."""

    mean: tuple[float, ...] = (0.0,)
    """The mean of each channel, or of all: `shift_factor` or `latents_mean` of diffusers' configs."""
    std: tuple[float, ...] = (1.0,)
    """1 / `scaling_factor`, times `latents_std` where the config has it."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The scale in a config of diffusers' AutoencoderKL. Raises UserError where it is of other numbers."""
        factor = config.get("scaling_factor", 0.18215)
        if not _is_number(factor) or not factor > 0:
            raise UserError(f"scaling_factor in the autoencoder's config is {brief(factor)}; write a number above 0")
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        std = config.get("latents_std") or [1.0]
        channels = config.get("latent_channels", 4)
        for name, values in {"latents_mean or shift_factor": mean, "latents_std": std}.items():
            are_numbers = isinstance(values, list | tuple) and all(map(_is_number, values))
            if not are_numbers or len(values) not in (1, channels) or (values is std and min(values) <= 0):
                raise UserError(
                    f"{name} in the autoencoder's config is {brief(values)}; write a number, or one for each of the "
                    f"{brief(channels)} channels of the latents" + (", above 0" if values is std else "")
                )
        return cls(tuple(mean), tuple(value / factor for value in std))

    def apply(self, latents: Tensor) -> Tensor:
        """Of the autoencoder's own latents (B, C, *positions)."""
        return (latents - self._channels(self.mean, latents)) / self._channels(self.std, latents)

    def undo(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents (B, C, *positions)."""
        return latents * self._channels(self.std, latents) + self._channels(self.mean, latents)

    def latents(self, moments: Tensor, random: SampleRandom | None) -> Tensor:
        """Scaled latents (B, C, *positions) float32 of moments (B, 2 C, *positions), drawn by each sample's seed.

        random: None takes the mean.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        if random is None:
            return self.apply(mean)
        noise = random.normal("latent", *mean.shape[1:])
        return self.apply(mean + (0.5 * log_variance).exp() * noise)

    @staticmethod
    def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        each = [like.new_full((1,) * like.dim(), value) for value in values]  # on the device, which waits for nothing
        return torch.cat(each, dim=1) if len(each) > 1 else each[0]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_FLOAT32


class Autoencoder(FrozenNetwork):
    """A frozen AutoencoderKL in its own precision, also under a run's autocast.

    Attributes: `scale`; `compression`, pixels per latent position and side; `latent_channels` C.
    """

    forward_methods = ("moments", "decode")
    time_compression: int | None = None
    """Frames of a clip per latent frame, after the first one; None where it takes pictures alone."""

    def __init__(
        self,
        config: Mapping[str, Any],
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        tiling: bool = False,
        slicing: bool = False,
        key: str = "autoencoder",
    ):
        """
        Args:
            config: constructor numbers of diffusers' AutoencoderKL; weights are random.
            tiling: decode in overlapping tiles of `sample_size` pixels, which bounds the memory of large pictures.
            slicing: one picture at a time.
            key: the config key that an error names.

        Raises:
            UserError: `float16` where the config says `force_upcast`, as SDXL's does: its activations overflow.
        """
        super().__init__()
        if precision == "float16" and config.get("force_upcast", True):
            raise UserError(
                f"{key}: this autoencoder overflows in float16 (force_upcast); write float32 or bfloat16, or use "
                "weights that were made for float16"
            )
        self.model = construct(self.library_class(), config, key)
        self.key, self.precision, self.tiling = key, precision, tiling
        self.model.use_slicing = slicing
        self.scale = self.scale_of(self.model.config)
        self.compression = self.compression_of(self.model.config)
        self.latent_channels = self.channels_of(self.model.config)
        freeze(self.model.eval(), precision, key)

    @staticmethod
    def library_class() -> type[nn.Module]:
        """diffusers' class."""
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @staticmethod
    def scale_of(config: Mapping[str, Any]) -> LatentScale:
        """The scale of the latents, by a config of the library's."""
        return LatentScale.of(config)

    @staticmethod
    def compression_of(config: Mapping[str, Any]) -> int:
        """Pixels per latent position and side. Raises UserError where the config has no levels."""
        levels = config.get("block_out_channels", [64])
        if not isinstance(levels, list | tuple) or not 0 < len(levels) <= MAX_LEVELS:
            said = brief(levels)
            raise UserError(f"block_out_channels in the autoencoder's config is {said}; list one for each level")
        return 2 ** (len(levels) - 1)

    @staticmethod
    def channels_of(config: Mapping[str, Any]) -> int:
        """C."""
        return config.get("latent_channels", 4)

    @classmethod
    def load(
        cls, path: Path, config: Mapping[str, Any] | None = None, key: str = "autoencoder", **options
    ) -> "Autoencoder":
        """With the weights of a diffusers folder (also a pipeline's, with `vae` in it) or of a safetensors file.

        Args:
            path: files in diffusers' names.
            config: constructor numbers, for a file that does not hold its own.
            options: `precision`, `tiling`, `slicing`.

        Raises:
            UserError: files are missing or made for another network, or nothing says how it is built.
        """
        path = component_folder(Path(path), "vae")
        config = config or read_config(path, key)
        if config is None:
            raise UserError(
                f"{key}: {path} does not say which autoencoder it is (scaling_factor differs between SD and SDXL, "
                "whose files are alike); name a diffusers folder, or give its config"
            )
        return cls.of(config, partial(read_tensors, path, key), path, key, **options)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Callable[[], Mapping[str, Tensor]], path: Path,
        key: str = "autoencoder", **options,
    ) -> "Autoencoder":  # fmt: skip
        """With weights that `tensors` gives when they are wanted; `path`, where they are from, is named in errors.

        Raises:
            UserError: they are made for another network.
        """
        with torch.device("meta"):
            autoencoder = cls(config, key=key, **options)
        if are_only_shapes():
            return autoencoder
        found = {_current_name(name): tensor for name, tensor in tensors().items()}
        fill(autoencoder.model, found, path, key, next(autoencoder.parameters()).dtype)
        autoencoder.model.requires_grad_(False)
        return autoencoder

    def weights_to_save(self) -> dict[str, Tensor]:
        """The weights under diffusers' names."""
        return self.model.state_dict()

    def metadata_to_save(self) -> dict[str, str]:
        """The config, as metadata of a safetensors file: `load` reads it there."""
        return said_config(self.model)

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        """Mean, then log variance (B, 2 C, H / compression, W / compression) float32, of pictures (B, 3, H, W) uint8.

        Log variances are clamped to [-30, 20].

        Raises:
            UserError: a side that `compression` does not divide.
        """
        height, width = pictures.shape[-2:]
        if pictures.dtype != torch.uint8:
            raise TypeError(f"pictures are uint8, not {pictures.dtype}")
        if height % self.compression or width % self.compression:
            raise UserError(
                f"{self.key}: a picture of {width} x {height} px; sides have to be multiples of {self.compression}"
            )
        pixels = to_device(pictures, self.device).to(self.model.dtype) / 127.5 - 1
        self.model.use_tiling = False  # tiles would change what is learnt; only large pictures are decoded in them
        with self.in_own_precision():
            return self._encode(pixels).float()

    forward = moments

    def _encode(self, pixels: Tensor) -> Tensor:
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [0, 1] of scaled latents (B, C, h, w)."""
        if latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, this autoencoder {self.latent_channels}")
        own = self.scale.undo(to_device(latents, self.device).float()).to(self.model.dtype)
        self.model.use_tiling = self.tiling
        with self.in_own_precision():
            pixels = self._decode(own)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _current_name(name: str) -> str:
    match = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)", name)
    return name if match is None else f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
