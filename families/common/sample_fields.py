"""What a run may know of each sample beside picture and caption: a template, a mask, whether it is of the prior.

Every training script of a diffusion model has this through `families.common.training.DiffusionTraining`.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from families.common.captions import captions_kept
from families.common.features import CAPTION_SETTINGS, PICTURE_SETTINGS, Feature, stored
from families.common.members import MASK
from families.common.tags import TagSettings, drawn_tags
from warpcore.core import WarpCore
from warpcore.data.fields import PictureField
from warpcore.data.images import Geometry
from warpcore.data.reader import Batch
from warpcore.data.samples import PICTURE_EXTENSIONS, PICTURE_FACTS, VISUAL_EXTENSIONS, Sample
from warpcore.data.shards import resolve_sources
from warpcore.idle_keys import Need
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

LATENT_MASK = "latent_mask"
"""The feature of a cache that holds masks at the size of the latents."""


class SampleSettings(TagSettings):
    """Keys on what counts of the samples, and on captions out of templates."""

    needs = {"prior_weight": Need.of("prior_path")}

    caption_templates: list[str] = []
    """One of these is a sample's caption, chosen at random; in it, `{caption}` stands for its own."""
    masked_loss: bool = False
    """Where a sample has a `mask.png`, its white parts are learnt and its black ones are not."""
    prior_path: str | list[str | dict[str, Any]] | None = None
    """Further data, written like `webdataset_path`, with its own captions: what the network should not forget."""
    prior_weight: NonNegativeFloat = 1.0
    """Weight of the loss of samples from `prior_path`."""

    @model_validator(mode="before")
    @classmethod
    def _prior_samples_are_drawn_too(cls, values: dict[str, Any]) -> dict[str, Any]:
        data, prior = (listed(values.get(key)) for key in ("webdataset_path", "prior_path"))
        usable = all(isinstance(entry, str | dict) for entry in prior)  # others are mistakes of `prior_path` alone
        if data and prior and usable:  # the saved config of a run holds the joined list: join once
            values = values | {"webdataset_path": data + [entry for entry in prior if entry not in data]}
        return values

    @model_validator(mode="after")
    def _templates_hold_captions_alone(self) -> Self:
        for template in self.caption_templates:
            if unknown := re.search(r"\{(?!caption\})[^}]*\}?", template):
                raise ValueError(f"caption_templates: {unknown[0]} in {template!r} means nothing; {{caption}} does")
        return self


def listed(paths: Any) -> list:
    """The entries of a `webdataset_path`."""
    return paths if isinstance(paths, list) else [] if paths is None else [paths]


class SampleFields(WarpCore):
    """Hooks of a training script for `SampleSettings`."""

    config: SampleSettings
    caption_settings: ClassVar[tuple[str, ...]] = CAPTION_SETTINGS
    """Settings that what is made of captions depends on; caches with others are refused."""
    mask: Tensor | None = None
    """How much each part of the current batch's pictures or latents is learnt (B, 1, *sizes); None: all alike."""
    sample_weight: Tensor | None = None
    """How much each sample of the current batch counts (B,); None: all alike."""

    @property
    def captions_vary(self) -> bool:
        """Whether a sample's text, or what it means, differs from draw to draw: then no cache can hold it."""
        return bool(self.config.caption_templates) or self.config.tags_vary

    @property
    def needs_captions(self) -> bool:
        templates = self.config.caption_templates
        return not templates or self.config.prior_path is not None or any("{caption}" in t for t in templates)

    def sample_fields(self, from_cache: bool) -> dict:
        """Members of a sample to read: `mask` (1, H, W) uint8, and `prior`, a bool.

        from_cache: the samples hold no pictures, and no masks.
        """
        config, fields = self.config, {}
        if config.masked_loss and not from_cache:
            fields["mask"] = MaskField((MASK, *PICTURE_EXTENSIONS))
        if config.prior_path is not None:
            sources = resolve_sources(config.prior_path, "prior_path")
            shards = frozenset(shard.url for source in sources for shard in source.shards)
            fields["prior"] = FromField((*VISUAL_EXTENSIONS, PICTURE_FACTS), shards)
        return fields

    def caption_features_to_cache(self, *names: str) -> dict[str, Feature]:
        """What the text encoder makes of a caption, by name, where a cache can hold it."""
        return {} if self.captions_vary else {name: Feature("text", self.caption_settings) for name in names}

    def mask_feature(self, network: str) -> dict[str, Feature]:
        """The feature `latent_mask`, where masks are used; `network` makes the latents."""
        return {LATENT_MASK: Feature(network, PICTURE_SETTINGS)} if self.config.masked_loss else {}

    def mask_of_pictures(self, batch: Batch, latents: Tensor) -> dict[str, Tensor]:
        """The feature `latent_mask` (B, 1, *positions) of a batch of pictures, where masks are used."""
        return {LATENT_MASK: resized(batch.extra["mask"].float() / 255, latents)} if self.config.masked_loss else {}

    def prior(self, batch: Batch) -> list[bool]:
        """Which samples come from `prior_path`."""
        return batch.extra.get("prior", [False] * len(batch.keys))

    def captioned(self, batch: Batch) -> Batch:
        """The batch with captions out of the templates."""
        templates, random = self.config.caption_templates, SampleRandom(batch.seeds)
        return replace(batch, captions=choose_captions(batch.captions, self.prior(batch), templates, random))

    def with_drawn_captions(self, batch: Batch) -> Batch:
        """The batch with captions as they are drawn: of some of their tags, out of the templates."""
        return self.captioned(replace(batch, captions=drawn_tags(batch.captions, batch.seeds, self.config)))

    def drawn_captions(self, batch: Batch) -> list[str | None]:
        kept = captions_kept(SampleRandom(batch.seeds), getattr(self.config, "caption_dropout", 0.0)).tolist()
        drawn = self.with_drawn_captions(batch).captions
        return [caption if keep else None for caption, keep in zip(drawn, kept, strict=True)]

    def texts_of(self, captions: list[tuple[str, str]]) -> list[str]:
        """What the text encoder sees of (shard, caption) pairs."""
        prior = self.sample_fields(from_cache=True).get("prior")
        return texts_read(captions, prior.shards if prior else (), self.config.caption_templates)

    def encoded(self, batch: Batch) -> tuple[Any, SampleRandom]:
        config = self.config
        self.mask = self.sample_weight = None
        if config.masked_loss:
            mask = stored(batch, LATENT_MASK)
            self.mask = (batch.extra["mask"].float() / 255) if mask is None else mask.float()
        if config.prior_path is not None:
            weights = [config.prior_weight if is_prior else 1.0 for is_prior in self.prior(batch)]
            self.sample_weight = to_device(torch.tensor(weights), self.device)
        return super().encoded(self.with_drawn_captions(batch))

    def data_to_draw(self) -> Any:
        """The data that are learned, not those that should not be forgotten."""
        prior = listed(self.config.prior_path)
        data = self.config.webdataset_path
        return [entry for entry in listed(data) if entry not in prior] if prior else data

    def held_out(self) -> Batch | None:
        batch = super().held_out()
        return batch and self.captioned(batch)


def resized(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask (B, 1, *sizes) at the positions of latents (B, C, *positions)."""
    if mask.shape[2:] == latents.shape[2:]:
        return mask
    return F.interpolate(mask, latents.shape[2:], mode="area")


def choose_captions(
    own: Sequence[str], prior: Sequence[bool], templates: Sequence[str], random: SampleRandom
) -> list[str]:
    """Each sample's caption out of one of the templates; samples of the prior keep theirs."""
    if not templates:
        return list(own)
    chosen = (random.on_cpu.uniform("caption template") * len(templates)).long().tolist()
    return [
        caption if is_prior else templates[i].replace("{caption}", caption)
        for caption, is_prior, i in zip(own, prior, chosen, strict=True)
    ]


def texts_read(captions: Sequence[tuple[str, str]], prior: Container[str], templates: Sequence[str]) -> list[str]:
    """The texts that (shard, caption) pairs become: every template occurs, and the prior's captions stay."""
    if not templates:
        return [caption for _, caption in captions]
    own = [caption for shard, caption in captions if shard not in prior] or [""]
    pairs = ((templates[i % len(templates)], own[i % len(own)]) for i in range(max(len(own), len(templates))))
    filled = [template.replace("{caption}", caption) for template, caption in pairs]
    return filled + [caption for shard, caption in captions if shard in prior]


@dataclass(frozen=True)
class MaskField(PictureField):
    """The mask of a sample, white everywhere where it has none: then its picture is what stands at `suffixes`."""

    optional = (MASK, "masked_loss: true")

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Tensor:
        if any(member.lower() == MASK for member in sample.members):
            return super().decode(data, geometry, sample)
        return torch.full((1, *geometry.size), 255, dtype=torch.uint8)


@dataclass(frozen=True)
class FromField:
    """Whether a sample comes from one of some shards."""

    suffixes: tuple[str, ...]
    """The extension of a member that every sample has; it is read anyway."""
    shards: frozenset[str]

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> bool:
        return sample.shard in self.shards

    def blank(self, size: tuple[int, int]) -> bool:
        return False
