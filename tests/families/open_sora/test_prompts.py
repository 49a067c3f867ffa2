"""Prompts are read as the reference reads them, and what is wrong in one is shown."""

from functools import partial

import pytest

from families.open_sora.prompts import append_scores, parse_prompt
from tests.bounds import bounded
from tests.golden import load_case
from warpcore.errors import UserError

GOLDEN = load_case("opensora/prompts")[0]


def test_json_at_the_end_of_prompts_is_read_as_the_reference_does():
    rows = [row for row in GOLDEN["extract_json"] if "result" in row]
    assert len(rows) == 5
    for row in rows:
        found, expected = parse_prompt(row["input"]), row["result"]
        assert found.title == expected["prompt"].strip()
        assert ";".join(found.references) == expected["reference_path"]
        assert found.placements == parse_prompt("x", mask_strategy=expected["mask_strategy"]).placements


def test_texts_along_a_long_video_are_found_as_the_reference_does():
    rows = [row for row in GOLDEN["split"] if row["input"] != "|1|a|2|b"]  # which it draws as words
    assert len(rows) == 4
    for row in rows:
        found = parse_prompt(row["input"])
        assert [text for _, text in found.texts] == row["parts"]
        assert [loop for loop, _ in found.texts] == (row["loops"] or [0])
        assert [found.text_of(loop) for loop in range(5)] == [text.strip() for text in row["by_loop"]]


@pytest.mark.parametrize("row", GOLDEN["append_scores"], ids=lambda row: str(row["kwargs"]))
def test_scores_are_told_as_the_reference_does(row):
    assert [append_scores(text, **row["kwargs"]) for text in row["input"]] == row["result"]


def test_each_text_of_a_long_video_is_told_the_scores():
    scored = parse_prompt("|0|a dog|2|a cat").mapped(partial(append_scores, aes=6.5, camera_motion="pan left"))
    assert [scored.text_of(loop) for loop in (1, 2)] == [
        "a dog aesthetic score: 6.5. camera motion: pan left.", "a cat aesthetic score: 6.5. camera motion: pan left.",
    ]  # fmt: skip
    assert scored.title == "|0|a dog|2|a cat"  # files are not called after scores


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('waves{"mask_strategy": "0"', r"""'waves\{.*no \} at the end: '\{"mask_strategy": "0"'; write it such as"""),
        ('waves"mask_strategy": "0"}', r"'waves.*a \} comes before any \{; JSON at its end is written such as"),
        ("waves{0}", r"'\{0\}' is no JSON \(Expecting property name.*write one \{\.\.\.\} at its end"),
        ('two {"reference_path": "a"} {}', "is no JSON .Extra data"),
        ('a{"loop": 3}', "'loop' in .*holds texts, under reference_path and mask_strategy"),
        ('a{"mask_strategy": 0}', "'mask_strategy' in"),
        ('a{"mask_strategy": "0,x"}', "^prompt 'a.*': mask_strategy '0,x': '0,x': reference is 'x'; write a number"),
        ('a{"mask_strategy": "0", "mask_strategy": "1"}', "'mask_strategy' is given twice"),
        ('a{"reference_path": "b.png;;c.png"}', "reference_path 'b.png;;c.png' has an empty part"),
        ("|0|a|b|c", "'b' stands where a loop does; write |0|text|2|text"),
        ("|0|a|1", r"no text behind \|1\|; write \|1\|text"),
        ("|1|a|2|b", r"its loops are 1, 2; they begin with 0 and rise"),
        ("|0|a|3|b|3|c", "its loops are 0, 3, 3"),
        ("a dog |2|a cat", r"\|2\| comes after a text; begin with \|0\|: \|0\|text\|2\|text"),
        ("|", "stands where a loop does"),
    ],
)
def test_what_is_wrong_is_shown_in_one_line(prompt, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_prompt(prompt)
    assert "\n" not in str(caught.value)


def test_all_that_the_reference_refuses_is_refused():
    rows = [row["input"] for row in (*GOLDEN["extract_json"], *GOLDEN["split_invalid"]) if "error" in row]
    assert len(rows) == 6
    for prompt in rows:
        with pytest.raises(UserError):
            parse_prompt(prompt)


def test_references_for_all_prompts_are_those_of_prompts_that_name_none():
    assert parse_prompt("a", "b.png", "0").references == ("b.png",)
    own = parse_prompt('a{"reference_path": "c.png; d.png"}', "b.png", "0,1")
    assert own.references == ("c.png", "d.png")
    assert own.placements[0].reference == 1
    with pytest.raises(UserError, match=r"^mask_strategy 'x'"):
        parse_prompt("a", "b.png", "x")


@pytest.mark.parametrize("part", ["{", "|0|", "}", '{"a":', "|0|a", "{["])
def test_no_prompt_takes_long(part, tmp_path):
    with bounded(tmp_path), pytest.raises(UserError):
        parse_prompt(part * 100_000 + ("" if part != "}" else "{"))
