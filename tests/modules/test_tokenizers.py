"""CLIP's tokenizer gives the ids of transformers, with which the official text conditions were made."""

import random
import unicodedata
from functools import cache

import open_clip
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.tokenizers import BytePairTokenizer, ExtendedTokenizer, tokenize
from tests.bounds import bounded

OURS, BEFORE = BytePairTokenizer(), BytePairTokenizer("open_clip")
PIECES = [
    "a", "Dog", "1", "42", " ", "\n", "\t", "\x1c", "\x85", "\xa0", "'s", "'LL", "\u2019s", "\u201cred\u201d",
    "\u2026", "&amp;", "&lt;b&gt;", "\ufb01ne", "\ufb02", "\u0132", "e\u0301", "\u00e9", "\u039f\u03a3", "\u0130",
    "\u56f3", "\U0001f436", "-", "...",
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<start_of_text>", "|>", "\u200d", "\ufeff",
]  # fmt: skip


@cache
def theirs() -> transformers.CLIPTokenizer:
    pairs = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in pairs.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(pairs.bpe_ranks))


def their_ids(text: str) -> list[int]:
    return theirs()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "the dog\u2019s \u201cbest\u201d bone", "salt &amp; pepper", "&lt;b&gt;", "an o\ufb03ce \ufb01ne",
        "\uff21\uff22\uff23",
        "\u00c3\u00a9", "\u039f\u0394\u039f\u03a3", "\u0130stanbul", "e\u0301",
        "one\x1ctwo", "ends<|endoftext|>here", "<|ENDOFTEXT|>!",
    ],
)  # fmt: skip
def test_text_that_open_clip_rewrites_gets_the_ids_of_transformers(text):
    assert OURS.encode(text) == their_ids(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=12).map("".join))
def test_any_text_gets_the_ids_of_transformers(text):
    # Which characters that Unicode has not assigned yet are letters depends on a library's version.
    text = "".join(character for character in text if unicodedata.category(character) != "Cn")
    assert OURS.encode(text) == their_ids(text)


def test_ids_of_earlier_runs_stay_those_of_open_clip():
    for text in ("the dog\u2019s &amp; cat", "\ufb01ne", "a red circle"):
        assert BEFORE.encode(text) == open_clip.SimpleTokenizer().encode(text)
    assert OURS.encode("the dog\u2019s") != BEFORE.encode("the dog\u2019s")


def test_further_tokens_leave_the_ids_of_the_text_around_them():
    tokenizer = ExtendedTokenizer(OURS, ["[dog]"])
    text = ["\u039f\u0394\u039f\u03a3 \u2019 ", "[DOG]", " &amp; \ufb01ne"]
    expected = [*their_ids(text[0]), tokenizer.added["[dog]"], *their_ids(text[2])]
    assert tokenizer.encode("".join(text)) == expected


@pytest.mark.parametrize("tokenizer", [OURS, BEFORE], ids=["clip", "open_clip"])
@pytest.mark.parametrize("letters", [range(97, 123), range(0x4E00, 0x9FFF)], ids=["latin", "chinese"])
def test_a_word_of_a_million_letters_has_the_ids_of_its_beginning_in_a_moment(tmp_path, tokenizer, letters):
    drawn = random.Random(0)
    word = "".join(chr(drawn.choice(letters)) for _ in range(10**6))
    tokenizer.encode("loaded")
    with bounded(tmp_path, seconds=4):
        ids, _ = tokenize(tokenizer, [word], 77, 0)
    assert ids[0].tolist() == tokenize(tokenizer, [word[:450]], 77, 0)[0][0].tolist()
