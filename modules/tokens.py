"""Tokens of a text encoder that are trained: further ones, or some of its vocabulary, each a row of the embedding.

Only these rows have gradients and optimizer state; the table and the rest of the encoder stay frozen.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class HasVocabulary(Protocol):
    """What tokens there are: a tokenizer, or a text encoder."""

    vocab_size: int
    """The ids are below this."""
    vocabulary: Mapping[str, int]
    """The tokens that stand for text, with their ids. As in CLIP's, a token that ends a word ends with `</w>`."""


class TextEncoder(HasVocabulary, Protocol):
    """A text encoder whose tokens can be trained."""

    token_embedding: nn.Module
    """Makes (B, L, D) of token ids (B, L)."""
    width: int
    """D."""

    def extend(self, embedding: nn.Module, names: Sequence[str]) -> None:
        """Embed token ids with another table, and read further tokens, whose ids follow the others, wherever they
        stand in a text, in upper or lower case."""


@dataclass(frozen=True)
class Token:
    """A token to train: its name, its id, and the ids of the tokens whose mean it starts from (zeros without any)."""

    name: str
    id: int
    sources: tuple[int, ...]


def is_new(name: str) -> bool:
    """Whether a name is that of a further token, such as `[fernando]`, and not of the vocabulary."""
    return name[:1] + name[-1:] in ("[]", "<>")


def find_tokens(tokenizer: HasVocabulary, entries: Sequence[tuple[str, str | None]]) -> list[Token]:
    """The tokens that entries of `train_tokens` stand for, each once.

    `['[fernando]', '^dog</w>']` is a further token that starts as the mean of those tokens of the vocabulary that the
    regular expression finds, or as zeros where it is None. `['^snail', None]` are those that it finds.

    Raises ValueError for an expression that finds nothing and for a token that would not stay whole.
    """
    found: dict[str, Token] = {}
    vocab_size = tokenizer.vocab_size
    for name, pattern in entries:
        if is_new(name):
            _check_new(name, tokenizer, found)
            sources = () if pattern is None else tuple(_search(pattern, tokenizer).values())
            found[name] = Token(name, vocab_size, sources)
            vocab_size += 1
        elif pattern is not None:
            raise ValueError(
                f"{[name, pattern]}: only a new token starts from others, and is written in brackets. "
                f"Write [{name!r}, null] to train the tokens that it finds"
            )
        else:
            found |= {token: Token(token, i, (i,)) for token, i in _search(name, tokenizer).items()}
    return list(found.values())


def _check_new(name: str, tokenizer: HasVocabulary, found: dict[str, Token]) -> None:
    if name.lower() in {other.lower() for other in found} or name.lower() in tokenizer.vocabulary:
        raise ValueError(f"{name!r} is there already, in upper or lower case; choose another name for the new token")
    if re.search(r"\s", name) or len(name) < 3:
        raise ValueError(f"{name!r} cannot stay whole in a text: write one word in brackets, such as '[fernando]'")


def _search(pattern: str, tokenizer: HasVocabulary) -> dict[str, int]:
    vocabulary = tokenizer.vocabulary
    try:
        found = {token: i for token, i in vocabulary.items() if pattern and re.search(pattern, token)}
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if not found:
        near = ", ".join(difflib.get_close_matches(pattern, vocabulary, n=4, cutoff=0.5)) or "none"
        raise ValueError(
            f"{pattern!r} finds no token of the vocabulary (near ones: {near}). A new token is written in brackets, "
            "with the tokens it starts from: ['[fernando]', '^dog</w>']"
        )
    return found


class TokenRows(nn.Module):
    """The rows of trained tokens: initial + delta, both (T, D) in float32; `delta` is trained and starts as zeros."""

    def __init__(self, tokens: Sequence[Token], initial: Tensor):
        super().__init__()
        self.tokens, self.active = tuple(tokens), True
        ids = torch.tensor([token.id for token in tokens], device=initial.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("initial", initial.detach().float())
        self.delta = nn.Parameter(torch.zeros_like(self.initial))

    @classmethod
    def of(cls, encoder: TextEncoder, tokens: Sequence[Token]) -> "TokenRows":
        """Rows that start from the embedding of a text encoder."""
        device = next(encoder.token_embedding.parameters()).device

        def start(sources: tuple[int, ...]) -> Tensor:
            if not sources:
                return torch.zeros(encoder.width, device=device)
            rows = encoder.token_embedding(torch.tensor(sources, device=device))
            return rows.double().mean(dim=0).float()  # the same whatever the order of summation is

        return cls(tokens, torch.stack([start(token.sources) for token in tokens]))

    def set_activation_checkpointing(self, level: int) -> None:
        """Nothing here is worth computing again; a trained network is asked all the same."""

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Puts the rows where token ids (B, L) ask for them into what the table made of the ids, (B, L, D)."""
        rows = (self.initial + self.delta) if self.active else self.initial
        wanted = ids[..., None] == self.ids
        placed = rows.to(embedded.dtype)[wanted.int().argmax(dim=-1)]
        return torch.where(wanted.any(dim=-1, keepdim=True), placed, embedded)


class ExtendedEmbedding(nn.Module):
    """A table of embeddings with other rows for some ids: token ids (B, L) -> (B, L, D)."""

    def __init__(self, table: nn.Module, known: int, rows: TokenRows):
        super().__init__()
        self.table, self.known = table, known
        self.rows = (rows,)  # a tuple: they are a network of their own, with their own place, training and file

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[0](ids, self.table(ids.clamp(max=self.known - 1)))


def attach(encoder: TextEncoder, rows: TokenRows) -> None:
    """Let a text encoder read and embed the tokens. May be done again with further ones."""
    known = encoder.vocab_size
    new = [token for token in rows.tokens if token.id >= known]
    if [token.id for token in new] != list(range(known, known + len(new))):
        raise ValueError(f"the tokens {', '.join(token.name for token in new)} were made for another vocabulary")
    encoder.extend(ExtendedEmbedding(encoder.token_embedding, known, rows), [token.name for token in new])


@contextmanager
def untrained(rows: TokenRows) -> Iterator[None]:
    """Inside, the tokens are what they were before training."""
    rows.active = False
    try:
        yield
    finally:
        rows.active = True
