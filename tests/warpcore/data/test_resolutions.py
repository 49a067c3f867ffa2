"""Sizes and lengths that have names are those of the reference."""

import pytest

from tests.golden import load_case
from warpcore.data.resolutions import LENGTHS, RATIOS, named_length, named_size
from warpcore.errors import UserError

GOLDEN = load_case("opensora/aspect_ratios")[0]


def test_sizes_of_resolutions_and_ratios_are_those_of_the_reference():
    assert {name: f"{ratio:.2f}" for name, ratio in RATIOS.items()} == GOLDEN["ratios"]
    assert len(GOLDEN["get_image_size"]) > 50
    for row in GOLDEN["get_image_size"]:
        if "error" in row:
            with pytest.raises(UserError, match=r"resolution: |aspect_ratio: "):
                named_size(row["resolution"], row["aspect_ratio"])
        else:
            assert [*named_size(row["resolution"], row["aspect_ratio"])] == row["result"]
    assert named_size("480p", "9:16") == named_size("480p") == (480, 854)
    assert named_size("256", "1:1") == named_size("256") == (256, 256)  # which has no 9:16


def test_lengths_are_those_of_the_reference():
    assert GOLDEN["lengths"] == LENGTHS
    assert named_length("4s") == 102
    with pytest.raises(UserError, match=r"'3s' is no length; write a number of frames, or one of 2s, 4s, 8s, "):
        named_length("3s")


@pytest.mark.parametrize(
    ("resolution", "ratio", "message"),
    [
        ("500p", "9:16", "resolution: '500p' has no sizes; write one of 144p, 240p, "),
        ("480p", "nan", "aspect_ratio: 'nan' is not among those of 480p"),
        ("256", "9:16", r"aspect_ratio: '9:16' .* height : width: write one of 12:25, 1:2, .*, 0\.25, 0\.26"),
        ("480p", "x" * 1000, "aspect_ratio: 'x"),
    ],
)
def test_what_has_no_size_is_told_what_has(resolution, ratio, message):
    with pytest.raises(UserError, match=message):
        named_size(resolution, ratio)
