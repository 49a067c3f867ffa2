"""Captions to token ids: CLIP's byte-pair tokenizer, and a word list for small towers."""

import re
from collections.abc import Sequence
from functools import lru_cache

import open_clip
import torch
from torch import Tensor

UNKNOWN_WORD = "<unknown>"


class BytePairTokenizer:
    """The tokenizer of the public CLIP models (its vocabulary comes with open_clip)."""

    begin_id, end_id, vocab_size = 49406, 49407, 49408

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

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, 0) for word in split_words(text)]


def split_words(text: str) -> list[str]:
    """The lower-case words and single punctuation marks of a caption, as `WordTokenizer` counts them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def tokenize(
    tokenizer: BytePairTokenizer | WordTokenizer, texts: Sequence[str], length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
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
def _open_clip_tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()
