"""Braces in paths: as webdataset's braceexpand expands them, and bounded."""

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bounds import bounded
from warpcore.data.braces import Braces
from warpcore.errors import UserError


def test_ranges_keep_leading_zeros_only():
    assert list(Braces("a{08..11}b{x,y}{z}"))[:3] == ["a08bx{z}", "a08by{z}", "a09bx{z}"]
    assert list(Braces("{8..11}")) == ["8", "9", "10", "11"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..010..5}.tar", ["000.tar", "005.tar", "010.tar"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b{0..1},{c,d}e}", ["a", "b0", "b1", "ce", "de"]),
        ("{a..c}{X..Z..2}", ["aX", "aZ", "bX", "bZ", "cX", "cZ"]),
        ("x{,y}", ["x", "xy"]),
        ("{../data}", ["{../data}"]),
        ("a}{b", ["a}{b"]),
        ("{{a,b}", ["{a", "{b"]),
        ("{{0..1}}", ["{0}", "{1}"]),
        ("", [""]),
    ],
)
def test_steps_letters_nesting_and_literal_braces(pattern, expected):
    braces = Braces(pattern)
    assert list(braces) == expected
    assert braces.count == len(expected)


_TEXT = st.text("ab-.", max_size=2).filter(lambda text: ".." not in text)
_NUMBER = st.integers(0, 12)
_RANGES = st.one_of(
    st.tuples(_NUMBER, _NUMBER).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}"),
    st.tuples(_NUMBER, _NUMBER, st.integers(1, 4)).map(lambda ends: f"{{{ends[0]:02}..{ends[1]:02}..{ends[2]}}}"),
    st.tuples(*[st.sampled_from("abcdef")] * 2).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}"),
)
_PATTERNS = st.recursive(
    _TEXT | _RANGES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
        st.lists(inner, max_size=3).map("".join),
        inner.filter(lambda text: "," not in text and ".." not in text).map(lambda text: f"{{{text}}}"),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(_PATTERNS)
def test_balanced_braces_mean_what_webdataset_means(pattern):
    if Braces(pattern).count <= 2000:
        assert list(Braces(pattern)) == list(braceexpand(pattern))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{0..99999999}", "stands for 100000000 paths, at most 10000000"),
        ("{0..999999999999999999}" * 500, r"about \d+ digits paths"),
        ("{a,b}" * 64, "paths, at most"),
        (
            "{0..99999999999999999999}",
            r"\{0\.\.99999999999999999999\} in .* is not a valid range: write \{000\.\.041\}",
        ),
        ("{0..5..0}", "not a valid range"),
        ("{-1..3}", "not a valid range"),
        ("{a..Z}", "not a valid range"),
        ("{a,{" * 500 + "}}" * 500, "more than 20 levels deep"),
    ],
)
def test_a_pattern_that_stands_for_too_much_or_nothing_is_refused(pattern, told, tmp_path):
    with pytest.raises(UserError, match=told), bounded(tmp_path):
        Braces(pattern)


@settings(max_examples=300, deadline=None)
@given(st.text("{},.a0-[*", max_size=60))
def test_any_text_is_expanded_or_refused(pattern):
    try:
        braces = Braces(pattern)
    except UserError:
        return
    paths = iter(braces)
    assert isinstance(next(paths), str)
