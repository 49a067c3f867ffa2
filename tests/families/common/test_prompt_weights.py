"""Weights in prompts and captions are read as text, which drawings and the report of a data set say."""

import numpy as np
import pytest

from families.common.prompt_weights import about_weights, has_weights
from tools.build_dataset import build_dataset
from warpcore.pictures import save_png


@pytest.mark.parametrize("text", ["a (red:1.3) box", "(long hair: 0.8), box", "(a, b:2)", "((ears:1.05)), x"])
def test_a_number_behind_a_word_in_brackets_is_a_weight(text):
    assert has_weights(text)


@pytest.mark.parametrize("text", ["a (red) box", "at 10:30 (16:9)", "box :D (x", "(scale 1:2)", "a: 1.5", "a:1.2)"])
def test_other_brackets_and_colons_are_none(text):
    assert not has_weights(text)


def test_prompts_with_weights_are_told_once():
    assert about_weights(["a box", "a star"]) == []
    (told,) = about_weights(["a (red:1.3) box", "a star", "a (red:1.3) box", "(blue:2)"])
    assert told.startswith(
        "weights such as (red:1.3) are read as text, brackets and numbers included: in 2 prompts (a"
    )


def test_the_report_of_a_data_set_counts_captions_with_weights(tmp_path):
    for name, caption in (("a", "box, (red:1.3)"), ("b", "box, (red)"), ("c", "box")):
        save_png(tmp_path / "in" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
        (tmp_path / "in" / f"{name}.txt").write_text(caption, encoding="utf-8")
    told = str(build_dataset(tmp_path / "in", tmp_path / "out"))
    assert "weights such as (word:1.2) in captions: 1 (a.png); training reads them as text" in told
