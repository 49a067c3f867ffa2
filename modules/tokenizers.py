"""Captions to token ids: CLIP's byte-pair tokenizer, a word list for small towers, and further tokens for both.

A tokenizer has `encode`, `begin_id`, `end_id`, `vocab_size`, and `vocabulary`: the tokens that stand for text, with
their ids. As in CLIP's, a token that ends a word ends with `</w>`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from modules.clip_weights import load_open_clip

UNKNOWN_WORD = "<unknown>"


class BytePairTokenizer:
    """The tokenizer of the public CLIP models (its vocabulary comes with open_clip)."""

    begin_id, end_id, vocab_size = 49406, 49407, 49408

    @property
    def vocabulary(self) -> dict[str, int]:
        return {token: i for token, i in _open_clip_tokenizer().encoder.items() if i < self.begin_id}

    def encode(self, text: str) -> list[int]:
        return _open_clip_tokenizer().encode(text)


class WordTokenizer:
    """A fixed list of lower-case words and punctuation marks; whatever is not in it is one unknown word.

    Ids: 0 the unknown word, then the words in the order given, then begin and end.
    """

    def __init__(self, words: Sequence[str]):
        self.ids = {word: i for i, word in enumerate([UNKNOWN_WORD, *words])}
        if len(self.ids) != len(words) + 1:
            raise ValueError("the vocabulary of a word tokenizer holds a word twice")
        self.begin_id, self.end_id, self.vocab_size = len(self.ids), len(self.ids) + 1, len(self.ids) + 2

    @property
    def vocabulary(self) -> dict[str, int]:
        return {f"{word}</w>": i for word, i in self.ids.items() if word != UNKNOWN_WORD}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, 0) for word in split_words(text)]


class ExtendedTokenizer:
    """A tokenizer with further tokens, kept whole wherever they stand in a text, in upper or lower case."""

    def __init__(self, base: "Tokenizer", tokens: Sequence[str]):
        self.base, self.begin_id, self.end_id = base, base.begin_id, base.end_id
        self.vocab_size = base.vocab_size + len(tokens)
        self.added = {token.lower(): base.vocab_size + i for i, token in enumerate(tokens)}
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})", re.IGNORECASE)

    @property
    def vocabulary(self) -> dict[str, int]:
        return self.base.vocabulary | self.added

    def encode(self, text: str) -> list[int]:
        pieces = [piece.lower() for piece in self._pattern.split(text)]
        return [i for p in pieces for i in ([self.added[p]] if p in self.added else self.base.encode(p))]


Tokenizer = BytePairTokenizer | WordTokenizer | ExtendedTokenizer


def split_words(text: str) -> list[str]:
    """The lower-case words and single punctuation marks of a caption, as `WordTokenizer` counts them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) int64 and mask (B, L) bool, which is True from the begin token to the end token.

    A longer text loses its tail but keeps its end token; a shorter one is padded with `pad_id`.
    """
    ids = torch.full((len(texts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(texts), length), dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens = [tokenizer.begin_id, *tokenizer.encode(text)[: length - 2], tokenizer.end_id]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return ids, mask


@lru_cache(maxsize=1)
def _open_clip_tokenizer():
    return load_open_clip().SimpleTokenizer()
