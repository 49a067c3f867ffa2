"""Braces in paths, as shells and webdataset expand them: `{a,b}`, `{000..041}`, `{000..041..2}`, `{a..e}`, and nested.

Numbers keep the width of the first one where it begins with a zero. Braces around one text, and a brace without its
other half, are part of the name.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise, product

from warpcore.errors import UserError
from warpcore.text import brief, shortened

MAX_PATHS = 10_000_000
MAX_NESTED = 20
_NUMBERS = re.compile(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?")
_LETTERS = re.compile(r"(?=[a-z]\.\.[a-z]|[A-Z]\.\.[A-Z])(\w)\.\.(\w)(?:\.\.(\d{1,2}))?")
_LIKE_A_RANGE = re.compile(r"[^{},/]*\.\.[^{},/]*")


class Braces:
    """The paths that a pattern stands for: `a{00..02}{x,y}` is a00x, a00y, a01x, ...

    Raises:
        UserError: a range that is none, too deep nesting, or more than MAX_PATHS paths.
    """

    def __init__(self, pattern: str):
        ends, opened = {}, []
        for place, letter in enumerate(pattern):
            if letter == "{":
                opened.append(place)
            elif letter == "}" and opened:
                ends[opened.pop()] = place
        self._sequence = _parse(pattern, 0, len(pattern), ends)
        self.count = self._sequence.count
        if self.count > MAX_PATHS:
            raise UserError(
                f"webdataset_path: {brief(pattern)} stands for {brief(self.count)} paths, at most {MAX_PATHS} can be "
                "named: give the folder, or a glob"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequence)


@dataclass(frozen=True)
class _Text:
    text: str
    count = 1

    def __iter__(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class _Range:
    """Numbers, or letters by their code points."""

    first: int
    last: int
    step: int
    width: int = 0
    letters: bool = False

    @property
    def count(self) -> int:
        return abs(self.last - self.first) // self.step + 1

    def __iter__(self) -> Iterator[str]:
        up = 1 if self.first <= self.last else -1
        numbers = range(self.first, self.last + up, up * self.step)
        return (chr(one) if self.letters else str(one).zfill(self.width) for one in numbers)


@dataclass(frozen=True)
class _Choice:
    choices: "list[_Sequence]"

    @property
    def count(self) -> int:
        return sum(one.count for one in self.choices)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.choices)


@dataclass(frozen=True)
class _Sequence:
    parts: "list[_Text | _Range | _Choice | _Sequence]"

    @property
    def count(self) -> int:
        return math.prod(one.count for one in self.parts)

    def __iter__(self) -> Iterator[str]:
        return map("".join, product(*self.parts))


def _parse(pattern: str, start: int, stop: int, ends: dict[int, int], level: int = 0) -> _Sequence:
    """What stands in pattern[start:stop]. ends: of each opening brace the place of the closing one."""
    if level > MAX_NESTED:
        raise UserError(f"webdataset_path: {brief(pattern)} has braces in braces, more than {MAX_NESTED} levels deep")
    parts, place, begun = [], start, start
    while place < stop:
        if (end := ends.get(place)) is None:
            place += 1
            continue
        parts += [_Text(pattern[begun:place]), _group(pattern, place, end, ends, level)]
        place = begun = end + 1
    return _Sequence([*parts, _Text(pattern[begun:stop])])


def _group(pattern: str, start: int, end: int, ends: dict[int, int], level: int) -> _Range | _Choice:
    """What a brace at `start`, closed at `end`, stands for."""
    inside = pattern[start + 1 : end]
    if _LIKE_A_RANGE.fullmatch(inside):
        return _range(inside, pattern)
    commas, place = [], start + 1
    while place < end:
        if pattern[place] == ",":
            commas.append(place)
        place = ends.get(place, place) + 1
    if not commas:
        inner = _parse(pattern, start + 1, end, ends, level + 1)
        return _Choice([_Sequence([_Text("{"), inner, _Text("}")])])
    edges = [start, *commas, end]
    return _Choice([_parse(pattern, one + 1, other, ends, level + 1) for one, other in pairwise(edges)])


def _range(inside: str, pattern: str) -> _Range:
    found = None
    if match := _NUMBERS.fullmatch(inside):
        first, last, step = match.groups()
        padded = any(end != "0" and end.startswith("0") for end in (first, last))
        found = _Range(int(first), int(last), int(step or 1), max(len(first), len(last)) if padded else 0)
    elif match := _LETTERS.fullmatch(inside):
        first, last, step = match.groups()
        found = _Range(ord(first), ord(last), int(step or 1), letters=True)
    if found is None or found.step == 0:
        raise UserError(
            f"webdataset_path: {{{shortened(inside, 60)}}} in {brief(pattern)} is not a valid range: write "
            "{000..041}, {000..041..2} for every second one, {a..e}, or {a,b}"
        )
    return found
