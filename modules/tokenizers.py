"""Captions to token ids: CLIP's byte-pair tokenizer, a word list for small towers, and further tokens for both.

A tokenizer has `name`, which changes when a text's ids do, `encode`, `begin_id`, `end_id`, `vocab_size`, and
`vocabulary`: the tokens that stand for text, with their ids. As in CLIP's, a token that ends a word ends with `</w>`.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import regex
import torch
from torch import Tensor

from modules.clip_weights import load_open_clip

MAX_TEXT, MAX_WORD = 4000, 500
"""Characters of a text that become byte pairs, of which encoders read less than a hundred; and how many of a word are
taken together: the time grows with their square."""
UNKNOWN_WORD = "<unknown>"
_SPECIAL = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
_SPECIAL_TEXT = regex.compile("(" + "|".join(map(regex.escape, _SPECIAL)) + ")")
_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
_LONG = regex.compile(rf"(\S{{{MAX_WORD}}})")
_RUNS = regex.compile(f"{_SPECIAL_TEXT.pattern[1:-1]}|{_WORDS.pattern}")


class BytePairTokenizer:
    """The tokenizer of the public CLIP models (its vocabulary comes with open_clip).

    ids: whose ids a text gets. `clip`: those of transformers' `CLIPTokenizer` (version 5, and the fast one of version
    4), which made the text conditions of Stable Cascade. `open_clip`: those of open_clip, which first replaces
    typographic quotes, ligatures and `&amp;` by plain ones; early versions of this project used them.
    """

    begin_id, end_id, vocab_size = 49406, 49407, 49408

    def __init__(self, ids: Literal["clip", "open_clip"] = "clip"):
        self.name = ids

    @property
    def vocabulary(self) -> dict[str, int]:
        return {token: i for token, i in _open_clip_tokenizer().encoder.items() if i < self.begin_id}

    def encode(self, text: str) -> list[int]:
        """The ids of a text's beginning, of `MAX_TEXT` characters."""
        text = " ".join(piece for piece in _LONG.split(text[:MAX_TEXT]) if piece)
        if self.name == "open_clip":
            return _open_clip_tokenizer().encode(text)
        return [i for part in _SPECIAL_TEXT.split(text) for i in self._encode_part(part)]

    def _encode_part(self, text: str) -> list[int]:
        if text in _SPECIAL:
            return [_SPECIAL[text]]
        pairs = _open_clip_tokenizer()
        # Character by character, which leaves the final sigma what `str.lower` would change.
        lowered = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
        words = (word for run in _RUNS.findall(lowered) for word in _WORDS.findall(run))
        written = ("".join(pairs.byte_encoder[byte] for byte in word.encode()) for word in words)
        return [pairs.encoder[token] for word in written for token in pairs.bpe(word).split(" ")]


class WordTokenizer:
    """A fixed list of lower-case words and punctuation marks; whatever is not in it is one unknown word.

    Ids: 0 the unknown word, then the words in the order given, then begin and end.
    """

    name = "words"

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
        self.base, self.name, self.begin_id, self.end_id = base, base.name, base.begin_id, base.end_id
        self.vocab_size = base.vocab_size + len(tokens)
        self.added = {token.lower(): base.vocab_size + i for i, token in enumerate(tokens)}
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})", re.IGNORECASE)

    @property
    def vocabulary(self) -> dict[str, int]:
        return self.base.vocabulary | self.added

    def encode(self, text: str) -> list[int]:
        added = self.added
        return [
            i
            for piece in self._pattern.split(text)
            for i in ([added[piece.lower()]] if piece.lower() in added else self.base.encode(piece))
        ]


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
