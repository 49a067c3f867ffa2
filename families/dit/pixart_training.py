"""What the training scripts of PixArt-alpha share: networks, text conditions, the loss, drawing."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from families.common.beginning import check_family
from families.common.cache import Shape
from families.common.captions import captions_kept
from families.common.features import CAPTION_SETTINGS, Feature, Origin, lengths_name, stored
from families.common.pictures import to_pictures
from families.common.prompt_samples import PromptSamples
from families.common.sampling import draw_latents, sample_seeds
from families.dit import pixart_build
from families.dit.pixart_conditions import (
    FEATURE,
    MASK,
    TEXT,
    own_empty_text,
    sizes,
    told,
    whole_pictures,
    without_text,
)
from families.dit.pixart_config import PixartConfig
from families.dit.training import LatentTraining, latent_shape
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom

Conditions = dict[str, Tensor]


class PixartTraining(LatentTraining, PromptSamples):
    """Trains the denoiser of PixArt-alpha, or what steers it."""

    config: PixartConfig
    family = "pixart"
    caption_settings = (*CAPTION_SETTINGS, "clean_captions")
    first_defaults = {"clean_captions": None}

    def check_start(self) -> None:
        check_family(self.config, self.family)
        pixart_build.network_numbers(self.config)

    @property
    def needs_geometry(self) -> bool:
        return self.config.version.sees_sizes

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return super().encoders() | {"text": partial(pixart_build.text_encoder, self.config, self.device)}

    def network_files(self, network: str) -> list[Path]:
        return pixart_build.text_files(self.config) if network == "text" else super().network_files(network)

    def read_shape(self, name: str) -> Shape | None:
        if name == FEATURE:
            return None, pixart_build.network_numbers(self.config)["caption_channels"]
        return super().read_shape(name)

    @property
    def features(self) -> dict[str, Feature]:
        texts = self.caption_features_to_cache(FEATURE)
        texts = {name: Feature(one.network, one.settings, variable_length=True) for name, one in texts.items()}
        return super().features | texts

    def texts_made_with(self, origin: Origin) -> dict[str, str]:
        return super().texts_made_with(origin) | {"clean_captions": str(self.config.clean_captions)}

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        return {FEATURE: made.hidden.float(), lengths_name(FEATURE): made.lengths}

    def told(self, texts: dict[str, Tensor]) -> Conditions:
        return told(texts, self.config.version.text_length)

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Conditions]:
        return self.latents_of(batch, random), self.conditions(batch)

    def conditions(self, batch: Batch) -> Conditions:
        """What the network is told of each sample: its text, and for 1024-MS its size."""
        texts = {name: stored(batch, name) for name in (FEATURE, lengths_name(FEATURE))}
        own = self.told(self.text_conditions(batch.captions) if texts[FEATURE] is None else texts)
        if not self.needs_geometry:
            return own
        geometry = batch.geometry
        told_size = geometry.source if self.config.size_condition == "source" else geometry.size
        return own | sizes(told_size, geometry.size)

    def with_dropout(self, conditions: Conditions, random: SampleRandom) -> Conditions:
        """The conditions, some with an empty text. It is the network's own: caches are made without the network."""
        empty = self.without_text(conditions)
        kept = captions_kept(random, self.config.caption_dropout)
        return conditions | {
            TEXT: torch.where(kept[:, None, None], conditions[TEXT], empty[TEXT]),
            MASK: torch.where(kept[:, None], conditions[MASK], empty[MASK]),
        }

    def without_text(self, conditions: Conditions) -> Conditions:
        """The conditions with an empty text."""
        own = own_empty_text(self.networks["generator"])
        return without_text(conditions, own, {} if own is not None else self.told(self.text_conditions([""])))

    def loss(self, inputs: tuple[Tensor, Conditions], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        conditions = self.with_dropout(conditions, random)
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
        config, autoencoder = self.config, self.networks["autoencoder"]
        conditions = self.told(self.text_conditions(prompts))
        if self.needs_geometry:
            conditions |= whole_pictures(len(prompts), size, self.device)
        latents = draw_latents(
            self.diffusion, self.networks["generator"], conditions, self.without_text(conditions),
            latent_shape(size, autoencoder.latent_channels, autoencoder.compression),
            sample_seeds(config.seed, len(prompts)),
            steps=config.sample_steps, sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_rescale=0.0, guidance_channels=config.guided_channels(config.sample_sampler),
        )  # fmt: skip
        return {"sample": to_pictures(autoencoder.decode(latents))}
