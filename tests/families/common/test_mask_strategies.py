"""References come to where the reference implementation puts them, and what is wrong in a strategy is shown."""

from dataclasses import astuple

import pytest
import torch

from families.common.mask_strategies import aligned, parse_mask_strategy, place_references
from tests.golden import load_case, resolve
from warpcore.errors import UserError

GOLDEN, TENSORS = load_case("opensora/mask_strategies")


def test_strategies_are_read_as_the_reference_does():
    assert len(GOLDEN["parse"]) == 10
    for row in GOLDEN["parse"]:
        assert [[*astuple(placement)] for placement in parse_mask_strategy(row["input"])] == row["result"]


@pytest.mark.parametrize("call", GOLDEN["calls"], ids=lambda call: call["name"])
def test_references_are_placed_as_the_reference_does(call):
    given, expected = (resolve(call[key], TENSORS) for key in ("kwargs", "result"))
    align = given["align"] or 1
    for i, (latents, references) in enumerate(zip(given["z"], given["references"], strict=True)):
        placements = parse_mask_strategy(given["mask_strategy"][i])
        found, shares = place_references(latents, references, placements, given["loop"], align)
        assert torch.equal(found, expected["z"][i])
        torch.testing.assert_close(shares, expected["mask"][i])


def test_starts_are_moved_as_the_reference_does():
    for row in GOLDEN["find_nearest_point"]:
        assert aligned(row["value"], row["max_value"], row["point"]) == row["result"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,0,0,0,0,0", "'0,0,0,0,0,0,0' has 7 numbers; write at most 6: loop, reference, "),
        ("a", "'a': loop is 'a'; write a number, such as 0"),
        ("0,,1", "'0,,1': reference is ''"),
        ("0;", "mask_strategy '0;': a placement is empty"),
        ("0;0,0,0,0,0", "'0,0,0,0,0': .*length from 1"),
        ("0,0,0,0,1,nan", "edit is from 0 to 1"),
    ],
)
def test_what_is_wrong_is_shown(text, message):
    with pytest.raises(UserError, match=message):
        parse_mask_strategy(text)


def test_all_strategies_that_the_reference_refuses_are_refused():
    for row in GOLDEN["parse_invalid"]:
        with pytest.raises(UserError):
            parse_mask_strategy(row["input"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1", "reference 1 of 1; they count from 0"),
        ("0,0,3", "frame 3 of reference 0, which has 3 latent frames"),
        ("0,0,0,-6", "frame -6 of the clip, which has 5 latent frames"),
    ],
)
def test_references_and_frames_that_there_are_not_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        place_references(torch.zeros(4, 5, 2, 2), [torch.zeros(4, 3, 2, 2)], parse_mask_strategy(text))


def test_references_of_another_size_are_refused():
    with pytest.raises(UserError, match="latents of reference 0 are 2 x 3, not 2 x 2"):
        place_references(torch.zeros(4, 5, 2, 2), [torch.zeros(4, 3, 2, 3)], parse_mask_strategy("0"))
