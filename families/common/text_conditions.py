"""What the text encoders of transformers have in common, whatever their kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from families.common.precision import FrozenNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Texts as an encoder reads them."""

    ids: Tensor
    """(B, L) int64, on the CPU; where texts are read in chunks, those one after another."""
    mask: Tensor
    """(B, L) bool: true for the tokens of a text, those at its begin and end included; of chunks without the tokens
    between them."""


@dataclass(frozen=True)
class TextConditions:
    """What texts are to the network that is trained."""

    hidden: Tensor
    """(B, L, D), padded positions included, as published networks read them; of several encoders beside each other."""
    pooled: Tensor | None
    """(B, P): the projected state of the end token; None where the last encoder has no projection."""
    mask: Tensor
    """(B, L) bool: where a text has tokens."""

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens of each text, those at its begin and end included."""
        return self.mask.sum(dim=1)


class LibraryTextEncoder(FrozenNetwork):
    """A frozen text encoder of transformers with its `tokenizer`; `key` is the config key that messages name."""

    forward_methods = ("encode",)
    tokenizer: "PreTrainedTokenizerBase"
    key: str

    @staticmethod
    def clean(text: str) -> str:
        """A text as the tokenizer gets it."""
        return text

    @property
    def length(self) -> int:
        """L: tokens of a text that are read at most, those at its begin and end included."""
        raise NotImplementedError

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts have more than L tokens."""
        cleaned = [self.clean(text) for text in texts]
        ids = self.tokenizer(cleaned, truncation=True, max_length=self.length + 1).input_ids if texts else []
        return [len(own) > self.length for own in ids]

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut to L, with what ends a text, and padded."""
        raise NotImplementedError

    def encode(self, tokens: Tokens) -> TextConditions:
        """The conditions of tokens, in the precision of the encoder."""
        raise NotImplementedError

    def forward(self, texts: Sequence[str]) -> TextConditions:
        """The conditions of texts."""
        return self.encode(self.tokenize(texts))
