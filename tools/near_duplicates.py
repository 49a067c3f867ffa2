"""Pictures that look the same: small fingerprints, and the groups of those that nearly agree.

A fingerprint is a difference hash: which of two neighbours in a grey picture of a few pixels is the brighter one, side
by side and one below the other (128 bits). What is drawn again in other colours has the same one, so colours are
compared as well.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np

SIDE = 8
MOST_BITS = 8
"""Fingerprints of pictures that look the same differ in at most this number of bits."""
MOST_COLOUR = 10.0
"""The mean difference of their colours, of 255, at most."""
MOST_RATIO = 1.1
"""The one picture's ratio of width to height divided by the other's, at most."""
_LARGE = 256
"""Of more fingerprints that agree in some of their bits, each is compared with those that follow it in their order."""
_FOLLOWING = 16


class Fingerprint(NamedTuple):
    """What a picture looks like, in few numbers."""

    bits: np.ndarray
    """(2 SIDE²,) bool."""
    colours: np.ndarray
    """(SIDE, SIDE, 3) uint8."""
    ratio: float
    """Width to height of the whole picture."""


def fingerprint(pixels: np.ndarray, ratio: float) -> Fingerprint:
    """That of a picture, uint8 (H, W, 3) and small, of which the whole one has the `ratio` of width to height."""
    pixels = np.ascontiguousarray(pixels)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    wide, high, colours = (
        cv2.resize(one, size, interpolation=cv2.INTER_AREA)
        for one, size in ((grey, (SIDE + 1, SIDE)), (grey, (SIDE, SIDE + 1)), (pixels, (SIDE, SIDE)))
    )
    bits = np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (high[1:] > high[:-1]).ravel()])
    return Fingerprint(bits, colours, ratio)


def look_alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two pictures look the same."""
    return (
        np.count_nonzero(one.bits != other.bits) <= MOST_BITS
        and float(np.abs(one.colours.astype(int) - other.colours).mean()) <= MOST_COLOUR
        and max(one.ratio / other.ratio, other.ratio / one.ratio) <= MOST_RATIO
    )


def duplicates(prints: list[Fingerprint]) -> list[list[int]]:
    """The groups of places of pictures that look the same, the largest first; those of one alone are left out.

    Of two fingerprints that differ in few bits, one of `MOST_BITS + 1` parts agrees: only those that share a part are
    compared, so that the time grows with their number and not with its square.
    """
    same: dict[bytes, list[int]] = {}
    for place, one in enumerate(prints):
        same.setdefault(one.bits.tobytes() + one.colours.tobytes(), []).append(place)
    firsts = [places[0] for places in same.values()]
    group = list(range(len(prints)))  # of each the place that stands for its group, or one on the way there

    def root(place: int) -> int:
        while group[place] != place:
            group[place] = place = group[group[place]]
        return place

    for first, second in [*_candidates(prints, firsts), *_same_pairs(prints, same.values())]:
        if (one := root(first)) != (other := root(second)) and look_alike(prints[first], prints[second]):
            group[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = {}
    for place in range(len(prints)):
        found.setdefault(root(place), []).append(place)
    return sorted((places for places in found.values() if len(places) > 1), key=lambda places: (-len(places), places))


def _same_pairs(prints: list[Fingerprint], groups: Iterable[list[int]]) -> Iterator[tuple[int, int]]:
    """Pictures with one fingerprint, which may still have other shapes: neighbours by these."""
    for places in groups:
        yield from pairwise(sorted(places, key=lambda place: prints[place].ratio))


def _candidates(prints: list[Fingerprint], places: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose fingerprints agree in a part, and may agree in nearly all."""
    if len(places) < 2:
        return
    bits = np.stack([prints[place].bits for place in places])
    order = sorted(range(len(places)), key=lambda i: (bits[i].tobytes(), prints[places[i]].colours.tobytes()))
    for part in np.array_split(np.arange(bits.shape[1]), MOST_BITS + 1):
        values = bits[:, part] @ (1 << np.arange(len(part)))
        sharing: dict[int, list[int]] = {}
        for i in order:
            sharing.setdefault(int(values[i]), []).append(i)
        for members in sharing.values():
            reach = len(members) if len(members) <= _LARGE else _FOLLOWING
            for start in range(len(members) - 1):
                others = members[start + 1 : start + 1 + reach]
                near = np.count_nonzero(bits[others] != bits[members[start]], axis=1) <= MOST_BITS
                yield from ((places[members[start]], places[others[i]]) for i in np.flatnonzero(near))
