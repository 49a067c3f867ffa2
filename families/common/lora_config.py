"""Configuration keys of LoRA training and of trained tokens, for every family."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from families.common.frozen_base import FrozenBaseKeys
from families.common.precision import BasePrecision
from modules.adapters import Kind, LoraSettings
from modules.lora import KINDS
from modules.tokens import is_new
from warpcore.config import Settings, ShareBelowOne
from warpcore.config_keys import MAX_ENTRIES
from warpcore.idle_keys import Need
from warpcore.keys import Weights

_OF_LOKR = Need("adapter: lokr", lambda config: config.adapter == "lokr")


class LoraKeys(FrozenBaseKeys):
    """Which layers get adapters, and what adapters are like."""

    needs = {
        "lora_init": Need(
            "adapters from scratch: they have those of lora_checkpoint_path, and their alpha is written",
            lambda config: config.lora_checkpoint_path is None or config.alpha is None,
        ),
        "factor": _OF_LOKR,
        "decompose_both": Need(
            "adapter: lokr, and full_matrix: false", lambda config: config.adapter == "lokr" and not config.full_matrix
        ),
        "full_matrix": _OF_LOKR,
        "split_qkv": Need("adapter: lora; others are always split", lambda config: config.adapter == "lora"),
    }

    module_filters: list[str] = Field(max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, such as `.attn`, or regular expressions on them; `.` is all."""
    adapter: Kind = "lora"
    """The kind of adapter. `lokr` and `loha` are those of LyCORIS: LoKr is a Kronecker product, with files that are
    smaller by far; LoHa is a product of two LoRAs, number by number, whose rank reaches the square of `rank`."""
    rank: PositiveInt
    """How much an adapter can hold: it is two matrices, one with this many columns, one with this many rows."""
    min_rank: PositiveInt | None = None
    """The rank at pure noise, from which it rises to `rank` where there is none: a LoRA of few pictures copies less of
    their composition (T-LoRA, arXiv:2507.05964); with `adapter: lora`. By default it is `rank` at every noise."""
    alpha: PositiveFloat | None = None
    """Adapters count alpha / rank. By default alpha is the rank, or 1 with `lora_init: published`."""
    rank_stabilised: bool = False
    """Adapters count alpha / sqrt(rank) instead, which suits high ranks (arXiv:2312.03732)."""
    dora: bool = False
    """Learn lengths and directions of the weights' rows apart (DoRA, arXiv:2402.09353); with `adapter: lora`."""
    factor: int = -1
    """Of LoKr: how many rows and columns the smaller matrix has where that divides those of a weight, else the largest
    divisor below; -1 makes both matrices as large as each other, and files smallest."""
    decompose_both: bool = False
    """Of LoKr: the smaller matrix is a product of low rank too, where that makes it smaller."""
    full_matrix: bool = False
    """Of LoKr: both matrices are whole, and `rank` and `alpha` count for nothing."""
    split_qkv: bool = False
    """Queries, keys and values of an attention layer get an adapter each, instead of one together as published."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout on what goes into the adapters."""
    lora_init: Literal["zero_up", "published"] = "zero_up"
    """What adapters start from. Both change nothing at first; `published`, the reference's, learns in larger steps."""
    lora_checkpoint_path: Weights | None = None
    """A LoRA with the same layers, rank and tokens to start from, in any format; its alpha may be another."""
    frozen_weights: BasePrecision | None = None
    """How the frozen network is kept: by default in the precision of the computation. `float8_e4m3fn` and
    `float8_e5m2` keep the matrices of linear layers in eight bits, with a scale for each row, `nf4` in four (needs
    torchao, and one process). `int8` also multiplies in eight bits, with a scale for each token, `int8_rotated` after
    a rotation that evens out channels of unequal size; `float8` does so in e4m3, on Ada, Hopper and later GPUs."""

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
            kind=self.adapter,
            factor=self.factor,
            decompose_both=self.decompose_both,
            full_matrix=self.full_matrix,
            min_rank=self.min_rank,
        )

    @model_validator(mode="after")
    def _an_adapter_that_there_is(self) -> Self:
        if self.adapter != "lora":
            title = KINDS[self.adapter].title
            if self.dora:
                raise ValueError(f"dora: {title} is trained without lengths; remove it, or write adapter: lora")
            if self.lora_init != "zero_up":
                raise ValueError(f"lora_init: {title} starts as LyCORIS does it; remove it, or write adapter: lora")
            if self.min_rank is not None:
                raise ValueError(
                    f"min_rank: {title} has no columns that each add to its rank; remove it, or write adapter: lora"
                )
        if self.min_rank is not None and self.dora:
            raise ValueError(
                "min_rank: the lengths that DoRA learns are those of the change of full rank; remove min_rank or dora"
            )
        if self.min_rank is not None and self.min_rank >= self.rank:
            raise ValueError(
                f"min_rank: {self.min_rank} is not below the rank, {self.rank}, so it changes nothing; write a "
                "smaller number, or remove it"
            )
        if self.factor == 0 or self.factor < -1:
            raise ValueError(f"factor: {self.factor} divides no weight; write a number from 1, such as 8, or -1")
        return self


class TransformerLoraKeys(LoraKeys):
    """Keys of a script that adapts the one denoiser of a family."""

    rank: PositiveInt = 16
    """How much an adapter can hold: it is two matrices, one with this many columns, one with this many rows."""

    @model_validator(mode="after")
    def _a_base(self) -> Self:
        if self.generator_checkpoint_path is None and not self.is_toy:
            raise ValueError("a LoRA changes a trained network: give generator_checkpoint_path")
        return self


class TokenKeys(Settings):
    """Tokens of the text encoder that are trained; for a `DiffusionConfig`."""

    needs = {"token_lr_scale": Need.of("train_tokens")}

    train_tokens: list[tuple[str, str | None]] | None = Field(None, max_length=MAX_ENTRIES)
    """Tokens to train: `['[fernando]', '^dog</w>']`, a new one that starts as the mean of those that a regular
    expression finds in the vocabulary, or `['^snail', null]`, those that it finds."""
    token_lr_scale: PositiveFloat = 1.0
    """The learning rate of the tokens is `lr` times this."""

    @model_validator(mode="after")
    def _tokens_can_be_learned(self) -> Self:
        if self.cache_text and self.train_tokens:
            raise ValueError("cache_text: what captions mean changes with train_tokens; remove one of the two")
        if self.train_tokens == []:
            raise ValueError("train_tokens is empty: write [['[fernando]', '^dog</w>']] for a token, or leave it out")
        if self.caption_templates and not any("{caption}" in template for template in self.caption_templates):
            said = " ".join(self.caption_templates).lower()
            unsaid = [name for name, _ in self.train_tokens or () if is_new(name) and name.lower() not in said]
            if unsaid:
                raise ValueError(f"no caption_templates entry holds the token {unsaid[0]}: it would learn nothing")
        return self
