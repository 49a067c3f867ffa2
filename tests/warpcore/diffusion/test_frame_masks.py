"""Given frames of training clips are those that the reference chooses with the same draws."""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.golden import load_case
from warpcore.diffusion.frame_masks import GIVEN, check_mask_ratios, frame_mask, frame_masks
from warpcore.errors import UserError

GOLDEN = load_case("opensora/training_masks")[0]
RECORDED = [call for call in GOLDEN["calls"] if "result" in call]
REFUSED = [call for call in GOLDEN["calls"] if "error" in call]
PUBLISHED = {"random": 0.2, "quarter_head": 0.1, "image_head": 0.1, "image_tail": 0.05}


def as_uniform(draws: list[list]) -> Iterator[float]:
    """The uniform numbers by which the recorded draws are made."""
    for kind, *arguments, value in draws:
        match kind:
            case "random":
                yield value
            case "uniform":
                yield (value - arguments[0]) / (arguments[1] - arguments[0])
            case "randint":
                yield (value - arguments[0] + 0.5) / (arguments[1] - arguments[0] + 1)
            case "rand":
                yield from value


def test_masks_are_those_of_the_reference():
    assert len(RECORDED) > 70
    assert {name for call in RECORDED for name in call["mask_ratios"]} == set(GIVEN)
    for call in RECORDED:
        draws = as_uniform(call["draws"])
        found = frame_mask(call["mask_ratios"], call["frames"], draws.__next__)
        assert [*map(int, found)] == call["result"], call


def test_clips_too_short_for_a_quarter_have_one_frame_given_where_the_reference_stops():
    assert REFUSED
    for call in REFUSED:
        assert call["frames"] in (2, 3)
        (name,) = call["mask_ratios"]
        mask = frame_mask(call["mask_ratios"], call["frames"], iter([0.5] * 9).__next__)
        assert mask.count(False) == (2 if name.endswith("head_tail") and call["frames"] == 3 else 1)


def test_masks_belong_to_samples_and_have_the_shares_asked_for():
    seeds = range(2000)
    masks = frame_masks(PUBLISHED, 8, seeds)
    assert masks.shape == (2000, 8)
    assert masks[5:7].tolist() == frame_masks(PUBLISHED, 8, [5, 6]).tolist()
    kinds = Counter(tuple(mask) for mask in masks.tolist())
    assert kinds[(True,) * 8] / 2000 == pytest.approx(0.55, abs=0.04)
    assert kinds[(True,) * 7 + (False,)] / 2000 == pytest.approx(0.05, abs=0.02)
    assert frame_masks({"random": 1.0}, 1, seeds).all()
    assert frame_masks({"random": 1.0}, 3, seeds).any(dim=1).all()
    assert frame_masks(PUBLISHED, 4, []).shape == (0, 4)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"random": 1.2}, "random: 1.2; write a share of the clips, from 0 to 1"),
        ({"random": -0.1}, "random: -0.1"),
        ({"head": 0.1}, "'head' is no mask; write some of random, intepolate"),
        ({"random": 0.7, "image_head": 0.6}, "they add up to 1.3"),
    ],
)
def test_other_ratios_are_refused(ratios, message):
    with pytest.raises(UserError, match=message):
        check_mask_ratios(ratios)


def test_published_ratios_are_taken():
    check_mask_ratios(PUBLISHED)
    check_mask_ratios(GOLDEN["completed_mask_ratios"])
