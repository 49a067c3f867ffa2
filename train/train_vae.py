"""Train an autoencoder (AutoencoderKL of diffusers) from scratch, or finetune one or its decoder alone.

    python3 train/train_vae.py configs/training/mini_vae.yaml

Pixels, a perceptual distance where its weights are given, and from `discriminator_start` on a patch discriminator say
how good a reconstruction is; the Kullback-Leibler divergence keeps latents near standard normal (arXiv:2112.10752).
The run's folder gets `autoencoder.safetensors` with diffusers' names, and its config inside.
"""

import warpcore.openmp
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from families.common.autoencoder_training import AutoencoderConfig, AutoencoderTraining, whitened_weights
from families.common.weight_files import FAMILY_KEY
from families.stable_diffusion.autoencoder_training import TrainedAutoencoder, from_scratch
from families.stable_diffusion.build import autoencoder_by_itself
from warpcore.data.buckets import whole_size
from warpcore.idle_keys import Need
from warpcore.keys import Weights

SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "mid_block_attention")
"""Keys that say how a new autoencoder is built."""


Channels = Annotated[int, Field(gt=0, le=8192)]


class VaeConfig(AutoencoderConfig):
    needs = {
        **dict.fromkeys(
            SIZES,
            Need("a new autoencoder", lambda config: config.autoencoder_checkpoint_path is None),
        ),
        "kl_weight": Need("decoder_only: false", lambda config: not config.decoder_only),
    }
    autoencoder_checkpoint_path: Weights | None = None
    """Autoencoder to start from: a folder of diffusers, a pipeline, a checkpoint in one file, or a file of its own; a
    new one without it. It keeps its `scaling_factor`, as denoisers of its latents were trained with that."""
    autoencoder_version: Literal["sd15", "sdxl"] | None = None
    """Whose autoencoder it is, where its file does not say it: they differ in their `scaling_factor`."""
    decoder_only: bool = False
    """Train the decoder alone: pictures keep their latents, so denoisers and caches of them stay valid."""
    block_out_channels: list[Channels] = Field([128, 256, 512, 512], min_length=1, max_length=12)
    """Channels of a new autoencoder's levels; each after the first halves the sides."""
    layers_per_block: Annotated[int, Field(gt=0, le=100)] = 2
    """Residual blocks of each level of its encoder; its decoder has one more."""
    latent_channels: Channels = 4
    """Channels of its latents."""
    norm_num_groups: PositiveInt = 32
    """Groups of its norms; divides every number of channels."""
    mid_block_attention: bool = True
    """Attention between all positions of the latents."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.autoencoder_checkpoint_path is None:
            if self.decoder_only:
                raise ValueError("decoder_only needs the encoder's weights: give autoencoder_checkpoint_path")
            if self.autoencoder_version is not None:
                raise ValueError(
                    "autoencoder_version says which autoencoder a file holds: give autoencoder_checkpoint_path"
                )
            if odd := [n for n in self.block_out_channels if n % self.norm_num_groups]:
                raise ValueError(
                    f"norm_num_groups: {self.norm_num_groups} does not divide block_out_channels {odd[0]}"
                )
        return self


class TrainVae(AutoencoderTraining):
    Config = VaeConfig

    def build(self) -> dict[str, nn.Module]:
        config, path = self.config, self.config.autoencoder_checkpoint_path
        if path is None:
            sizes = {key: getattr(config, key) for key in SIZES}
            model = from_scratch(**sizes, sample_size=max(whole_size(config.image_size)))
        else:
            model = autoencoder_by_itself(path, config.autoencoder_version).model
        return self.with_judges(TrainedAutoencoder(model, config.decoder_only))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        model, is_new = self.networks["autoencoder"].model, self.config.autoencoder_checkpoint_path is None
        return {"autoencoder": whitened_weights(model, self.latents) if is_new else model.state_dict()}

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | {FAMILY_KEY: "stable_diffusion"}


if __name__ == "__main__":
    TrainVae.main()
