"""The autoencoders of Open-Sora 1.0 and 1.1, whose latents have a frame for each of a clip: that of pictures, and one
with a decoder that sees all frames."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from families.common import clips
from families.common.autoencoders import SD_AUTOENCODER, Autoencoder
from families.common.weight_files import AUTOENCODER
from warpcore.random import SampleRandom

PUBLISHED_OF_FRAMES = SD_AUTOENCODER | {"scaling_factor": 0.18215, "sample_size": 256, "force_upcast": False}
"""Constructor numbers of sd-vae-ft-ema."""


class FrameClips(Autoencoder):
    """A frozen AutoencoderKL, in its own precision: each frame passes by itself.

    Args:
        frames_at_once: frames that pass at a time. config, precision, key: see `Autoencoder`.
    """

    align = 1
    forward_methods = ("clip_moments", "decoded_clips", "decoded_windows")

    def __init__(
        self, config: Mapping[str, Any], precision: str = "float32", frames_at_once: int = 4, key: str = AUTOENCODER
    ):
        super().__init__(config, precision, key=key)
        self.frames_at_once = frames_at_once

    def latent_frames(self, frames: int) -> int:
        return frames

    def frames_of(self, latent_frames: int) -> int:
        return latent_frames

    def clip_moments(self, pixels: Tensor, random: SampleRandom | None) -> Tensor:
        return clips.clip_moments(self, pixels, self.frames_at_once)

    forward = clip_moments

    def decoded_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        for window in latents.split(self.frames_at_once, dim=2):
            yield clips.decoded_clips(self, window, self.frames_at_once)

    def decoded_clips(self, latents: Tensor, frames: int) -> Tensor:
        return torch.cat(list(self.decoded_windows(latents, frames)), dim=1)


class TemporallyDecoded(FrameClips):
    """A frozen AutoencoderKLTemporalDecoder, that of Stable Video Diffusion: encodes each frame by itself, and decodes
    all frames of a clip together."""

    @staticmethod
    def library_class() -> type[nn.Module]:
        from diffusers import AutoencoderKLTemporalDecoder

        return AutoencoderKLTemporalDecoder

    def decoded_windows(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        self._frames = latents.shape[2]
        yield clips.decoded_clips(self, latents, len(latents) * latents.shape[2])

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents, num_frames=self._frames).sample
