"""What a LoRA, LoKr or LoHa holds, whatever file it came from: adapters by their places, and trained tokens."""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from modules.adapters import Kind
from modules.lora import KINDS, PARTS
from warpcore.errors import UserError
from warpcore.safe_json import parse_json

LARGEST_ALPHA = 1e9
"""Far above what is trained with; NaN is not below it."""


class LoraFileError(UserError):
    """A LoRA file is missing, unreadable, made for another network, or cannot be put into a format."""


def named_tokens(about: Mapping[str, str]) -> list[str]:
    """The trained tokens that a file's metadata name.

    Raises LoraFileError where they are no list of texts.
    """
    return named_texts(about, "tokens")


def named_texts(about: Mapping[str, str], key: str) -> list[str]:
    """The texts that a file's metadata name under a key. Raises LoraFileError where they are no JSON list of texts."""
    text = about.get(key, "[]")
    try:
        texts = parse_json(text)
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise LoraFileError(f"its metadata say {key}: {text[:60]}, which is not a JSON list of texts")
    return texts


def named_alpha(about: Mapping[str, str]) -> float | dict[str, float] | None:
    """The alpha that a file's metadata give, for all adapters or by their names; None where they give none.

    Raises LoraFileError where it is neither a number nor numbers by name.
    """
    text = about.get("alpha", "null")
    try:
        alpha = parse_json(text)
    except ValueError:
        alpha = text
    values = alpha.values() if isinstance(alpha, dict) else [alpha]
    if alpha is not None and not all(is_alpha(value) for value in values):
        raise LoraFileError(f"its metadata say alpha: {text[:60]}, which is no number, and no numbers by name")
    return alpha


def is_alpha(value: object) -> bool:
    """Whether a number of a file can be an alpha."""
    return type(value) in (int, float) and abs(value) < LARGEST_ALPHA


class OneAdapter:
    """The adapter of one weight, of any kind.

    magnitude, of DoRA: (C_out,), the length of each row of the changed weight, as trained here, or (1, C_in), of each
    input column, as OneTrainer trains by default.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    """Its factors by the names that `modules.lora.KINDS[kind]` has for them."""
    alpha: float
    magnitude: Tensor | None
    rank_stabilised: bool

    @property
    def title(self) -> str:
        return KINDS[self.kind].title

    @property
    def size(self) -> tuple[int, int]:
        """Of its product: (C_out, everything else)."""
        return KINDS[self.kind].size(self.tensors)

    @property
    def rank(self) -> int:
        """What alpha is divided by; of a LoKr without any, its alpha, as LyCORIS writes it."""
        return KINDS[self.kind].rank(self.tensors) or max(1, round(self.alpha))

    @property
    def scale(self) -> float:
        if KINDS[self.kind].rank(self.tensors) is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scale when it is divided by the rank."""
        return self.alpha * self.rank**0.5 if self.rank_stabilised else self.alpha

    @property
    def product(self) -> Tensor:
        """The scaled change (C_out, everything else), before DoRA."""
        return self.scale * KINDS[self.kind].product(self.tensors)

    @property
    def by_columns(self) -> bool:
        """Whether DoRA's lengths are those of input columns."""
        return self.magnitude is not None and self.magnitude.dim() == 2

    @property
    def is_depthwise(self) -> bool:
        """Whether it adapts a depthwise convolution by two matrices, which programs do differently."""
        return False


@dataclass(frozen=True)
class Adapter(OneAdapter):
    """A LoRA of one weight: `down` and `up` as in `modules.low_rank.LowRank`."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    rank_stabilised: bool = False
    kind: ClassVar[Kind] = "lora"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    @property
    def is_depthwise(self) -> bool:
        return self.down.dim() == 4 and self.down.shape[1] == 1 < self.up.shape[0]


@dataclass(frozen=True)
class FactorAdapter(OneAdapter):
    """A LoKr or LoHa of one weight, see `modules.lokr` and `modules.loha`."""

    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float
    magnitude: Tensor | None = None
    rank_stabilised: bool = False


def adapter_of(
    place: str, own: Mapping[str, Tensor], alpha: float | None, magnitude: Tensor | None, stabilised: bool = False
) -> OneAdapter:
    """The adapter that the factors of a file are; without an alpha it counts as it is.

    Raises LoraFileError where they are not whole, or do not go together.
    """
    kind = next((kind for kind, there in KINDS.items() if own.keys() & {*there.factors}), "lora")
    if other := own.keys() - {*KINDS[kind].factors}:
        raise LoraFileError(f"the {KINDS[kind].title} of {place} holds {min(other)}, which is a part of another kind")
    if kind == "lora":
        down, up = pair(place, own)
        return Adapter(down, up, up.shape[1] if alpha is None else alpha, magnitude, stabilised)
    if flat := [name for name, tensor in own.items() if tensor.dim() < 2 or not tensor.numel()]:
        raise LoraFileError(f"{flat[0]} of {place} has the shape {tuple(own[flat[0]].shape)}, which is no matrix")
    try:
        KINDS[kind].size(own)
    except ValueError as error:
        raise LoraFileError(f"the {KINDS[kind].title} of {place}: {error}") from None
    rank = KINDS[kind].rank(own) or 1
    return FactorAdapter(kind, dict(own), rank if alpha is None else alpha, magnitude, stabilised)


def lora_alone(adapters: Mapping[str, OneAdapter], program: str) -> None:
    """Raises LoraFileError where an adapter is no LoRA, for a program or a format that has no names for others."""
    for place, adapter in adapters.items():
        if adapter.kind != "lora":
            raise LoraFileError(f"{place} is adapted with {adapter.title}, which {program} does not have: {OTHERS}")


OTHERS = (
    "use lora-kohya, lora-comfyui or lora, those of them that the family has, or write weights that it is merged into"
)
"""What to do with an adapter that a format cannot express."""


@dataclass
class Lora:
    """What a LoRA file holds."""

    adapters: dict[str, OneAdapter]
    """By the names of their places (see `modules.lora.places`); q, k and v of an attention layer may be separate."""
    tokens: list[str] = field(default_factory=list)
    """Names of trained tokens: in brackets new ones, else tokens of the vocabulary."""
    token_initial: Tensor | None = None
    """(T, D): their rows of the embedding before training."""
    token_delta: Tensor | None = None
    """(T, D): what training added."""
    missing_tokens: list[str] = field(default_factory=list)
    """Tokens that were trained with the adapters, but are neither in the file nor beside it."""
    min_rank: int | None = None
    """The rank at pure noise that the adapters of a denoiser were trained with (`modules.rank_by_noise`)."""

    def with_tokens(self, names: list[str], initial: Tensor, delta: Tensor) -> "Lora":
        """The LoRA with further tokens; `initial` and `delta` (T, D) are as those here."""
        if self.tokens:
            initial, delta = torch.cat([self.token_initial, initial]), torch.cat([self.token_delta, delta])
        return replace(self, tokens=self.tokens + names, token_initial=initial, token_delta=delta)


def with_min_rank(lora: Lora, about: Mapping[str, str]) -> Lora:
    """The LoRA with the rank at pure noise that its file's metadata give, if they give one.

    Raises LoraFileError where it is no number from 1, or the adapters are of a kind that has none.
    """
    text = about.get("min_rank")
    if text is None:
        return lora
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise LoraFileError(f"its metadata say min_rank: {text[:60]}, which is no number from 1")
    for place, adapter in lora.adapters.items():
        if adapter.kind != "lora" or adapter.magnitude is not None:
            raise LoraFileError(f"its metadata say min_rank: {text}, but the adapter of {place} is no plain LoRA")
    return replace(lora, min_rank=int(text))


def pair(place: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The `down` and the `up` (C_out, R) of an adapter."""
    for part in ("down", "up"):
        if part not in own:
            raise LoraFileError(f"the adapter of {place} has no {part}: the file is not whole")
    if not own["up"].numel():
        raise LoraFileError(f"the adapter of {place} is empty: the file is not whole")
    if flat := [part for part in ("down", "up") if own[part].dim() < 2]:
        shape = tuple(own[flat[0]].shape)
        raise LoraFileError(f"the adapter of {place} has a {flat[0]} of the shape {shape}, which is no matrix")
    return own["down"], own["up"].flatten(1)


# ---------------------------------------------------------------- attention: one projection or three


def split_part(place: str) -> tuple[str, str | None]:
    """`....attn.q` -> (`....attn`, `q`); other names have no part."""
    layer, _, last = place.rpartition(".")
    return (layer, last) if last in PARTS else (place, None)


def split(adapters: Mapping[str, OneAdapter]) -> dict[str, OneAdapter]:
    """Adapters of whole attention projections as three that share their `down`."""
    separate = {}
    for place, adapter in adapters.items():
        if not place.endswith(".attn"):
            separate[place] = adapter
            continue
        if adapter.kind != "lora":
            raise LoraFileError(f"{place} is one {adapter.title} of queries, keys and values, which has no thirds")
        magnitudes = [None] * 3 if adapter.magnitude is None else adapter.magnitude.chunk(3)
        for part, up, magnitude in zip(PARTS, adapter.up.chunk(3), magnitudes, strict=True):
            separate[f"{place}.{part}"] = replace(adapter, up=up, magnitude=magnitude)
    return separate


def fused(adapters: Mapping[str, OneAdapter], there: Container[str] | None = None) -> dict[str, OneAdapter]:
    """Undo `split` wherever q, k and v are all there and share their `down`.

    there: names of a network's places; layers that it has apart (`attn.q` is a layer of its own) stay apart.
    """
    together: dict[str, OneAdapter] = {}
    for place, adapter in adapters.items():
        layer, part = split_part(place)
        parts = [adapters.get(f"{layer}.{part}") for part in PARTS]
        apart = there is not None and layer not in there
        if apart or part is None or None in parts or not all(_alike(adapter, other) for other in parts):
            together[place] = adapter
        elif layer not in together:
            magnitude = None if adapter.magnitude is None else torch.cat([other.magnitude for other in parts])
            together[layer] = replace(adapter, up=torch.cat([other.up for other in parts]), magnitude=magnitude)
    return together


def _alike(one: OneAdapter, other: OneAdapter) -> bool:
    if one.by_columns or other.by_columns:  # a column of the fused matrix is longer than those of its three parts
        return False
    if not one.kind == other.kind == "lora":
        return False
    return (
        (one.alpha, one.rank_stabilised, one.magnitude is None)
        == (other.alpha, other.rank_stabilised, other.magnitude is None)
        and torch.equal(one.down, other.down)
    )  # fmt: skip
