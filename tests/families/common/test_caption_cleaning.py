"""Captions are cleaned as published: beside recorded results, and two programs' rules where these have none."""

import time

import pytest

from families.common.caption_cleaning import MOST, clean_caption, lower_case
from families.common.captions import cut_note
from tests.golden import load_case

RECORDED = load_case("opensora/prompts")[0]["t5_cleaning"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["input"][:20])
def test_texts_become_what_the_reference_makes_of_them(case):
    assert clean_caption(case["input"]) == case["as_used"]
    assert lower_case(case["input"]) == case["off"]


@pytest.mark.parametrize(("text", "expected"), [
    ("a&nbsp;b &lt;i&gt;c&lt;/i&gt;", "a b c< i>"),  # markup behind markup
    ("a%20dog+on%2Fa hill", "a dog on a hill"),
    ("seen <script>x = 1</script>a <!-- not this --> cat<br/>here <![CDATA[too]]>", "seen a cathere too"),
    ("AT&T &unknown; &#65;&#x42", "at t unknown a x42"),
    ("it costs 3 at www.shop.com/a-b_c!, me@x.org", "it costs 3 at !, me"),
    ("mojibake cafÃ©", "mojibake cafã"),
    ("<3 a < b", "<3 a < b"),
    ("1.2.3.4 jc6640vc a1b2c 66vc2", ""),
])  # fmt: skip
def test_what_the_rules_say_of_markup_links_and_numbers(text, expected):
    """As diffusers' pipeline with its HTML parser, run twice, which is no dependency of this project."""
    assert clean_caption(text) == expected


@pytest.mark.parametrize("part", ["a.", "a-", "<", "&", "x ", "1.", "@", "#1 ", "'", "<b ", "a.png", "中", " ."])
def test_no_text_takes_long(part):
    begun = time.process_time()
    clean_caption(part * (MOST * 10))
    assert time.process_time() - begun < 5


def test_texts_without_a_word_are_told():
    class Encoder:
        clean = staticmethod(clean_caption)

    assert cut_note(Encoder(), ["a dog", "", "中文"], "captions") == [
        "1 of 3 captions have no word left after they are cleaned, and are read as empty ones, as '中文'; "
        "clean_captions: false only puts them in lower case"
    ]
    assert cut_note(Encoder(), ["a dog", ""], "captions") == []
