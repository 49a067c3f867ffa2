"""Train an autoencoder of clips (AutoencoderKLWan of diffusers, that of Wan 2.1) from scratch.

    python3 train/train_video_vae.py configs/training/mini_video_vae.yaml

A clip of 1 + 4 n frames becomes 1 + n frames of latents: the first frame is by itself, so that a picture is a clip of
one frame. Losses are those of `train/train_vae.py` on every frame. The run's folder gets `autoencoder.safetensors`
with diffusers' names, and its config inside.
"""

import warpcore.openmp
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from families.common.autoencoder_training import AutoencoderConfig, AutoencoderTraining, whitened_weights
from families.common.wan_autoencoder import check_frames
from families.common.wan_training import TIME_LEVELS, TrainedWanAutoencoder, from_scratch
from warpcore.clip_keys import ClipKeys
from warpcore.errors import UserError

SIZES = ("base_dim", "dim_mult", "num_res_blocks", "z_dim", "patch_size")
"""Keys that say how the autoencoder is built, named as in diffusers."""

Channels = Annotated[int, Field(gt=0, le=8192)]
Multiple = Annotated[int, Field(gt=0, le=64)]


class VideoVaeConfig(ClipKeys, AutoencoderConfig):
    base_dim: Channels = 96
    """Channels of the first level."""
    dim_mult: list[Multiple] = Field([1, 2, 4, 4], min_length=TIME_LEVELS + 1, max_length=12)
    """Channels of the levels, in multiples of `base_dim`. Each level after the first halves the sides, and the last
    two halve the number of frames as well."""
    num_res_blocks: Annotated[int, Field(gt=0, le=100)] = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    z_dim: Channels = 16
    """Channels of the latents."""
    patch_size: Annotated[PositiveInt, Field(le=16)] = 1
    """Squares with sides of `patch_size` pixels become channels first: a quick way to halve the sides."""

    @model_validator(mode="after")
    def _frames_fill_latents(self) -> Self:
        lengths = {frames for of_each in self.bucket_config.values() for frames in of_each}
        try:
            for frames in sorted(lengths) or [self.num_frames]:
                check_frames(frames, "bucket_config" if lengths else "num_frames")
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class TrainVideoVae(AutoencoderTraining):
    Config = VideoVaeConfig
    takes_videos = True

    def build(self) -> dict[str, nn.Module]:
        model = from_scratch(**{key: getattr(self.config, key) for key in SIZES})
        return self.with_judges(TrainedWanAutoencoder(model))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"autoencoder": whitened_weights(self.networks["autoencoder"].model, self.latents)}


if __name__ == "__main__":
    TrainVideoVae.main()
