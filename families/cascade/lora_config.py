"""What a training of LoRA understands, and what its samples are: captions out of templates, masks, prior samples."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from families.cascade.config import StageCConfig
from families.common.members import MASK
from modules.lora import LoraSettings
from modules.tokens import is_new
from warpcore.config import ShareBelowOne
from warpcore.data.images import Geometry
from warpcore.data.reader import PictureField
from warpcore.data.samples import PICTURE_EXTENSIONS, PICTURE_FACTS, Sample
from warpcore.data.shards import resolve_sources
from warpcore.keys import Weights
from warpcore.random import SampleRandom


class LoraConfig(StageCConfig):
    """Keys of `train/train_c_lora.py`."""

    module_filters: list[str]
    """Which layers are adapted: parts of their names, such as `.attn`, or regular expressions on them; `.` is all."""
    rank: PositiveInt
    """How much an adapter can hold: it is two matrices, one with this many columns, one with this many rows."""
    alpha: PositiveFloat | None = None
    """Adapters count alpha / rank. By default alpha is the rank, or 1 with `lora_init: published`."""
    rank_stabilised: bool = False
    """Adapters count alpha / sqrt(rank) instead, which suits high ranks (arXiv:2312.03732)."""
    dora: bool = False
    """Learn lengths and directions of the weights' rows apart (DoRA, arXiv:2402.09353)."""
    split_qkv: bool = False
    """Queries, keys and values of an attention layer get an adapter each, instead of one together as published."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout on what goes into the adapters."""
    lora_init: Literal["zero_up", "published"] = "zero_up"
    """What adapters start from. Both change nothing at first; `published`, the reference's, learns in larger steps."""
    lora_checkpoint_path: Weights | None = None
    """A LoRA with the same layers, rank and tokens to start from, in any format; its alpha may be another."""
    train_tokens: list[tuple[str, str | None]] | None = None
    """Tokens to train: `['[fernando]', '^dog</w>']`, a new one that starts as the mean of those that a regular
    expression finds in the vocabulary, or `['^snail', null]`, those that it finds."""
    token_lr_scale: PositiveFloat = 1.0
    """The learning rate of the tokens is `lr` times this."""
    caption_templates: list[str] = []
    """One of these is a sample's caption, chosen at random; in it, `{caption}` stands for its own."""
    masked_loss: bool = False
    """Where a sample has a `mask.png`, its white parts are learnt and its black ones are not."""
    prior_path: str | list[str | dict[str, Any]] | None = None
    """Further data, written like `webdataset_path`, with its own captions: what the network should not forget."""
    prior_weight: NonNegativeFloat = 1.0
    """Weight of the loss of samples from `prior_path`."""
    frozen_weights: Literal["float32", "bfloat16", "nf4"] | None = None
    """How the frozen network is kept: by default in the precision of the computation; `nf4` in four bits (needs
    torchao)."""

    @model_validator(mode="before")
    @classmethod
    def _prior_samples_are_drawn_too(cls, values: dict[str, Any]) -> dict[str, Any]:
        data, prior = (listed(values.get(key)) for key in ("webdataset_path", "prior_path"))
        if data and prior:  # the saved config of a run holds the joined list: join once
            values = values | {"webdataset_path": data + [entry for entry in prior if entry not in data]}
        return values

    @model_validator(mode="after")
    def _tokens_and_templates(self) -> Self:
        if self.cache_text and self.train_tokens:
            raise ValueError("cache_text: what captions mean changes with train_tokens; remove one of the two")
        if self.train_tokens == []:
            raise ValueError("train_tokens is empty: write [['[fernando]', '^dog</w>']] for a token, or leave it out")
        for template in self.caption_templates:
            if unknown := re.search(r"\{(?!caption\})[^}]*\}?", template):
                raise ValueError(f"caption_templates: {unknown[0]} in {template!r} means nothing; {{caption}} does")
        if self.caption_templates and not any("{caption}" in template for template in self.caption_templates):
            said = " ".join(self.caption_templates).lower()
            unsaid = [name for name, _ in self.train_tokens or () if is_new(name) and name.lower() not in said]
            if unsaid:
                raise ValueError(f"no caption_templates entry holds the token {unsaid[0]}: it would learn nothing")
        return self

    @property
    def lora_settings(self) -> LoraSettings:
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha or (1 if self.lora_init == "published" else self.rank),
            rank_stabilised=self.rank_stabilised,
            dropout=self.lora_dropout,
            dora=self.dora,
            split_qkv=self.split_qkv,
            init=self.lora_init,
        )


def listed(paths: Any) -> list:
    """The entries of a `webdataset_path`."""
    return paths if isinstance(paths, list) else [] if paths is None else [paths]


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


def sample_fields(config: LoraConfig, from_cache: bool = False) -> dict:
    """What of each sample is read beside picture and caption: `mask` (1, H, W) uint8, and `prior`, a bool.

    from_cache: the samples hold no pictures, and no masks.
    """
    masks = config.masked_loss and not from_cache
    fields = {"mask": MaskField((MASK, *PICTURE_EXTENSIONS))} if masks else {}
    if config.prior_path is None:
        return fields
    shards = frozenset(shard.url for source in resolve_sources(config.prior_path) for shard in source.shards)
    return fields | {"prior": FromField((*PICTURE_EXTENSIONS, PICTURE_FACTS), shards)}


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
    """Of any member that every sample has; it is read anyway."""
    shards: frozenset[str]

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> bool:
        return sample.shard in self.shards

    def blank(self, size: tuple[int, int]) -> bool:
        return False
