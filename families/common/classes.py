"""Classes of samples: numbers, or names in a list. Workers import this, so it stays light."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from warpcore.data.captions import BadCaption, member_value
from warpcore.data.expressions import Expression, compile_expression, near_names
from warpcore.data.fields import BadMember
from warpcore.data.images import Geometry
from warpcore.data.samples import PICTURE_FACTS, VISUAL_EXTENSIONS, Sample
from warpcore.errors import UserError
from warpcore.safe_json import parse_object
from warpcore.text import brief
from warpcore.transfer import to_device

KEY = "key"
"""In place of a member: the sample's key."""
NAMES_KEY = "class_names"
"""What an exported file calls the names of its classes."""


def class_number(value: Any, num_classes: int, names: Sequence[str] | Mapping[str, int] = ()) -> int:
    """The class that a number, a number as text, or one of the names means.

    Raises:
        ValueError: none of the classes; the message says what it is instead.
    """
    numbers = names if isinstance(names, Mapping) else {name: number for number, name in enumerate(names)}
    if isinstance(value, str) and value in numbers:
        return numbers[value]
    if isinstance(value, str) and value.isascii() and value.lstrip("-").isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int:
        if isinstance(value, str) and numbers:
            raise ValueError(f"{brief(value)} is no class.{near_names(value, numbers)} See class_names")
        raise ValueError(f"{brief(value)} is no class; classes are numbers from 0 to {num_classes - 1}")
    if not 0 <= value < num_classes:
        raise ValueError(f"class {value} is outside of 0 to {num_classes - 1} (num_classes: {num_classes})")
    return value


def title_of(label: int, names: Sequence[str]) -> str:
    """What a drawing of a class is called."""
    return names[label] if names else f"class {label}"


def label_tensors(
    labels: Sequence[int], num_classes: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Labels (B,) of classes for a network, and as many of no class, for guidance."""
    own = to_device(torch.tensor(labels), torch.device(device))
    return own, torch.full_like(own, num_classes)


def names_said(about: Mapping[str, str], what: str) -> list[str]:
    """The names of classes, in order, that a file's metadata say; none where they say none.

    Raises:
        UserError: they are damaged; the message begins with `what`.
    """
    names = parse_object(about[NAMES_KEY], what).get("names") if NAMES_KEY in about else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} is no list of names")
    return names


@dataclass(frozen=True)
class ClassField:
    """The class of a sample, an int64 scalar: an expression of one of its members, or of its key. Picklable.

    A cache holds the member, too, where it is a `.cls`, a `.json` or a `.txt`.
    """

    member: str
    """The extension of the member, or `KEY`."""
    expression: Expression
    num_classes: int
    names: tuple[str, ...] = field(default=(), repr=False)
    named_by: ClassVar[str] = "class_getter"

    @classmethod
    def parse(cls, getter: Sequence[str], num_classes: int, names: Sequence[str] = ()) -> Self:
        """From the config's `class_getter`, [member, expression].

        Raises:
            UserError: the expression takes several values, or may not be run.
        """
        member, text = getter
        expression = compile_expression(text)
        if expression.num_arguments != 1:
            raise UserError(f"class_getter: {text!r} takes {expression.num_arguments} values, not 1")
        return cls(member.lower().lstrip("."), expression, num_classes, tuple(names))

    @property
    def suffixes(self) -> tuple[str, ...]:
        # Where the key alone says it, something that every sample has, and that is read anyway.
        return (PICTURE_FACTS, *VISUAL_EXTENSIONS) if self.member == KEY else (self.member,)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Tensor:
        try:
            value = sample.key if self.member == KEY else member_value(self.member, {self.member: data})
            found = self.expression(value)
        except BadCaption as error:
            raise BadMember(str(error)) from None
        except Exception as error:  # what an expression makes of a strange value
            raise BadMember(f"class_getter {self.expression.text!r}: {type(error).__name__}: {error}") from None
        try:
            return torch.tensor(class_number(found, self.num_classes, self._numbers))
        except ValueError as error:
            raise BadMember(str(error)) from None

    def blank(self, size: tuple[int, int]) -> Tensor:
        return torch.tensor(0)
