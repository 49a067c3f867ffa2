"""Which frames of a clip are given in training, and which the network learns to draw (`mask_ratios` of Open-Sora).

A mask is true for frames that are noised, false for given ones. Frames are those of the latents.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from warpcore.errors import UserError
from warpcore.random import stable_hash

IDENTITY = "identity"
"""Nothing is given."""
LEAST_RANDOM, MOST_RANDOM = 0.1, 0.9
"""Between these is the share of frames that `random` gives, drawn for each clip."""
Draw = Callable[[], float]
"""Uniform numbers in [0, 1), another one at each call."""


def _whole(draw: Draw, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(draw() * (high - low + 1))


def _quarter(draw: Draw, frames: int) -> int:
    return _whole(draw, 1, max(frames // 4, 1))


def _one(draw: Draw, frames: int) -> int:
    return 1


def _anywhere(length: int, frames: int, draw: Draw) -> Sequence[int]:
    start = _whole(draw, 0, frames - length)
    return range(start, start + length)


def _head(length: int, frames: int, draw: Draw) -> Sequence[int]:
    return range(length)


def _tail(length: int, frames: int, draw: Draw) -> Sequence[int]:
    return range(frames - length, frames)


def _both_ends(length: int, frames: int, draw: Draw) -> Sequence[int]:
    return [*range(length), *range(frames - length, frames)]


def _random(frames: int, draw: Draw) -> Sequence[int]:
    share = LEAST_RANDOM + draw() * (MOST_RANDOM - LEAST_RANDOM)
    return [frame for frame in range(frames) if draw() <= share]


def _every_second(frames: int, draw: Draw) -> Sequence[int]:
    return range(_whole(draw, 0, 1), frames, 2)


def _run(length: Callable[[Draw, int], int], place: Callable[[int, int, Draw], Sequence[int]]):
    return lambda frames, draw: place(length(draw, frames), frames, draw)


GIVEN: dict[str, Callable[[int, Draw], Sequence[int]]] = {
    "random": _random,
    "intepolate": _every_second,  # as the published configs spell it
    "quarter_random": _run(_quarter, _anywhere),
    "quarter_head": _run(_quarter, _head),
    "quarter_tail": _run(_quarter, _tail),
    "quarter_head_tail": _run(_quarter, _both_ends),
    "image_random": _run(_one, _anywhere),
    "image_head": _run(_one, _head),
    "image_tail": _run(_one, _tail),
    "image_head_tail": _run(_one, _both_ends),
    IDENTITY: lambda frames, draw: (),
}
"""The frames that each name gives: one (`image_`) or up to a quarter of the clip, at least one, where its name says;
every second; or each by chance."""


def check_mask_ratios(ratios: Mapping[str, float]) -> None:
    """Raises UserError for a name that there is not, a ratio outside 0 to 1, or a sum above 1."""
    for name, ratio in ratios.items():
        if name not in GIVEN:
            raise UserError(f"mask_ratios: {name!r} is no mask; write some of {', '.join(GIVEN)}")
        if not 0 <= ratio <= 1:
            raise UserError(f"mask_ratios: {name}: {ratio}; write a share of the clips, from 0 to 1")
    if sum(ratios.values()) > 1 + 1e-6:
        raise UserError(f"mask_ratios: they add up to {sum(ratios.values()):g}; write shares that add up to 1 at most")


def frame_mask(ratios: Mapping[str, float], frames: int, draw: Draw) -> list[bool]:
    """The mask of a clip. At least one frame is noised, the last where all would be given; a single frame always is.

    Args:
        ratios: the share of clips by name; what they lack to 1 is `identity`.
        draw: the first number draws the name.
    """
    chosen = _name(ratios, draw())
    given = set(GIVEN[chosen](frames, draw)) if frames > 1 else set()
    mask = [frame not in given for frame in range(frames)]
    return mask if any(mask) else [False] * (frames - 1) + [True]


def _name(ratios: Mapping[str, float], drawn: float) -> str:
    reached = 0.0
    for name, ratio in ratios.items():
        reached += ratio
        if drawn < reached:
            return name
    return IDENTITY


def frame_masks(ratios: Mapping[str, float], frames: int, seeds: Sequence[int]) -> Tensor:
    """(B, frames) bool, on the CPU, of samples by their seeds: see `frame_mask`."""
    draws = [Random(stable_hash(seed, "frame mask")).random for seed in seeds]
    return torch.tensor([frame_mask(ratios, frames, draw) for draw in draws], dtype=torch.bool).view(-1, frames)
