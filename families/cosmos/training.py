"""What the training scripts of Cosmos-Predict2 share: networks, the diffusion process, text conditions, drawing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.beginning import check_family
from families.common.cache import Shape
from families.common.captions import captions_kept
from families.common.features import PICTURE_SETTINGS, Feature, lengths_name, stored
from families.common.pictures import to_pictures
from families.common.prompt_samples import PromptSamples
from families.common.sampling import sample_seeds
from families.common.t5 import padded
from families.cosmos import build
from families.cosmos.config import TARGET, CosmosConfig
from families.cosmos.sampling import MAX_SEED, draw, published_noise
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom

TEXT = "encoder_hidden_states"
"""What the network calls its text condition."""


class CosmosTraining(PromptSamples):
    """Trains the denoiser of Cosmos-Predict2, or what steers it."""

    config: CosmosConfig
    family = "cosmos"
    drawn_with = frozenset({"autoencoder"})
    default_target = TARGET

    def check_start(self) -> None:
        check_family(self.config, self.family)
        build.transformer_numbers(self.config)

    def said_target(self) -> str | None:
        return TARGET

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return build.process(self.config, loss_weight, self.config.offset_noise)

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "autoencoder": partial(build.autoencoder, self.config),
            "text": partial(build.text_encoder, self.config, self.device),
        }

    def network_files(self, network: str) -> list[Path]:
        return build.network_files(self.config, network)

    @property
    def features(self) -> dict[str, Feature]:
        texts = self.caption_features_to_cache("text")
        texts = {name: Feature(one.network, one.settings, variable_length=True) for name, one in texts.items()}
        return {"latents": Feature("autoencoder", PICTURE_SETTINGS)} | self.mask_feature("autoencoder") | texts

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """The means of the autoencoder's posteriors, scaled: published networks never saw a draw."""
        autoencoder = self.networks["autoencoder"]
        latents = autoencoder.scale.latents(autoencoder.moments(batch.images), None)
        return {"latents": latents} | self.mask_of_pictures(batch, latents)

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        return {"text": made.hidden.float(), lengths_name("text"): made.lengths}

    def read_shape(self, name: str) -> Shape | None:
        numbers = build.transformer_numbers(self.config)
        known = {"latents": (numbers["in_channels"], None, None), "text": (None, numbers["text_embed_dim"])}
        return known.get(name)

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return build.latents_of(self.config)

    @cached_property
    def patch_size(self) -> int:
        """Latent positions per token and side."""
        return build.transformer_numbers(self.config)["patch_size"][1]

    @property
    def bucket_factor(self) -> int:
        return self.latents[1] * self.patch_size

    def text_condition(self, text: Tensor) -> Tensor:
        """(B, L, D) float32 of hidden states (B, N, D): the network sees zeros where a text has ended."""
        return padded(text.float(), self.config.version.text_length)

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor]:
        latents, text = stored(batch, "latents"), stored(batch, "text")
        latents = self.picture_features(batch, random)["latents"] if latents is None else latents
        text = self.text_conditions(batch.captions)["text"] if text is None else text
        kept = captions_kept(random, self.config.caption_dropout)
        return latents.float(), self.text_condition(text) * kept[:, None, None]

    def loss(self, inputs: tuple[Tensor, Tensor], random: SampleRandom) -> Losses:
        latents, text = inputs
        losses = self.denoising_loss(latents, random, partial(self.networks["generator"], **{TEXT: text}))
        scale = self.config.loss_scale * (latents.shape[1] if self.config.loss_reduce == "sum" else 1)
        return replace(losses, loss=losses.loss * scale)

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
        config, autoencoder = self.config, self.networks["autoencoder"]
        text = self.text_condition(self.text_conditions(prompts)["text"])
        shape = (autoencoder.latent_channels, *(side // autoencoder.compression for side in size))
        seeds = sample_seeds(config.seed, len(prompts), MAX_SEED)
        latents = draw(
            self.diffusion, self.networks["generator"], {TEXT: text}, {TEXT: text.new_zeros(text.shape)}, shape, seeds,
            initial_noise=published_noise(seeds, shape),
            steps=config.sample_steps, sampler=config.sample_sampler, guidance=config.sample_guidance,
        )  # fmt: skip
        return {"sample": to_pictures(autoencoder.decode(latents))}
