"""What a sample's caption is: `captions_getter`. Workers import this, so it stays light."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from warpcore.data.expressions import Expression, compile_expression
from warpcore.data.samples import NO_PICKLE, PICKLES
from warpcore.errors import UserError
from warpcore.random import stable_hash
from warpcore.safe_json import parse_json
from warpcore.text import brief, shortened

COLUMN_PREFIX = "json."
"""`json.title` is the index column of the field `title`, read without opening the .json."""
MEASURED = ("width", "height", "key")
"""Other names of index columns; every other name is a member of the sample."""


class BadCaption(ValueError):
    """This sample has no usable caption; the message is the reason."""


@dataclass(frozen=True)
class CaptionGetter:
    """From members and index columns of a sample to its caption. Picklable.

    `['json', 'lambda j: j["caption"]']` reads the member `.json`; `[['txt', 'json.style', 'width'], 'lambda t, s, w:
    ...']` the member `.txt`, and the index columns of the field `style` and of the picture's width. An expression may
    give a list of captions, such as `['txt', 'lambda t: t.splitlines()']`: each draw of the sample has one of them.
    """

    names: tuple[str, ...]
    """Members and columns, in the order of the expression's arguments."""
    expression: Expression

    @classmethod
    def parse(cls, entry: Any) -> "CaptionGetter":
        """From the config's `[name or list of names, expression]`."""
        names = [entry[0]] if isinstance(entry, list | tuple) and entry and isinstance(entry[0], str) else None
        if isinstance(entry, list | tuple) and entry and isinstance(entry[0], list | tuple):
            names = list(entry[0])
        if not names or len(entry) != 2 or not all(isinstance(name, str) for name in names):
            raise UserError(
                "captions_getter: expected [member, expression], such as ['txt', identity], or [[members and "
                f"columns], expression], such as [['txt', 'json.style'], 'lambda t, s: t + s']; found {brief(entry)}"
            )
        expression = compile_expression(entry[1])
        if expression.num_arguments != len(names):
            raise UserError(
                f"captions_getter: {expression.text!r} takes {expression.num_arguments} values, not {len(names)}"
            )
        found = cls(tuple(name if _is_column(name) else name.lower().lstrip(".") for name in names), expression)
        if pickles := [member for member in found.members if member.split(".")[-1] in PICKLES]:
            raise UserError(f"captions_getter: .{pickles[0]} is {NO_PICKLE}")
        return found

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Extensions of the members that it reads."""
        return tuple(dict.fromkeys(name for name in self.names if not _is_column(name)))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Index columns that it reads, by the names that filters know them by: `style`, `width`."""
        return tuple(dict.fromkeys(name.removeprefix(COLUMN_PREFIX) for name in self.names if _is_column(name)))

    @property
    def setting(self) -> list:
        """As it stands in a config, where one name needs no list."""
        return [self.names[0] if len(self.names) == 1 else list(self.names), self.expression.text]

    def keys_of(self, member: str) -> list[str]:
        """The keys that the expression takes from a member that is JSON."""
        places = [place for place, name in enumerate(self.names) if name == member]
        return list(dict.fromkeys(key for place in places for key in self.expression.keys_of(place)))

    def __call__(
        self, contents: Mapping[str, bytes], columns: Mapping[str, Any] | None = None, seed: int | None = None
    ) -> str:
        """The caption, without surrounding white space.

        Args:
            contents: of the members, by extension.
            columns: values of the index columns.
            seed: of the sample's draw, which chooses one of several captions.

        Raises:
            BadCaption: a member is absent, not UTF-8 or not JSON, the expression fails, or its result is neither text
                nor a list of texts.
            UserError: there are several captions, and no seed.
        """
        values = [
            (columns or {})[name.removeprefix(COLUMN_PREFIX)] if _is_column(name) else member_value(name, contents)
            for name in self.names
        ]
        try:
            caption = self.expression(*values)
        except (KeyError, TypeError) as error:
            raise BadCaption(self._absent_key(error, values)) from None
        except Exception as error:
            raise BadCaption(f"captions_getter {self.expression.text!r}: {type(error).__name__}: {error}") from None
        several = caption if isinstance(caption, list | tuple) else [caption]
        if wrong := [one for one in several if not isinstance(one, str)]:
            raise BadCaption(f"the caption is not text but {type(wrong[0]).__name__}: {str(wrong[0])[:80]!r}")
        if isinstance(caption, str):
            return caption.strip()
        several = [text for one in several if (text := one.strip())]
        if not several:
            raise BadCaption("the list of captions has no text")
        if len(several) > 1 and seed is None:
            raise UserError(
                f"captions_getter {self.expression.text!r}: a sample has {len(several)} captions, of which every draw "
                "takes another one, but a cache holds what is made of one: cache the features of pictures alone "
                "(--features latents), or write an expression that gives one caption"
            )
        return several[stable_hash(seed, "caption") % len(several)] if len(several) > 1 else several[0]

    def _absent_key(self, error: KeyError | TypeError, values: list) -> str:
        """Which key, of what is inside of which others, a sample lacks, and what it has instead."""
        found = [
            absence
            for place, (name, value) in enumerate(zip(self.names, values, strict=True))
            for absence in _absences(name, value, self.expression.paths_of(place))
        ]
        of_error = [message for key, message in found if error.args and key == error.args[0]]
        told = [*of_error, *(message for _, message in found)]
        return told[0] if told else f"captions_getter {self.expression.text!r}: {type(error).__name__}: {error}"


def _absences(name: str, value: Any, paths: Iterable[Sequence[str | int]]) -> Iterator[tuple[str, str]]:
    """The first absent key of each path into the value of a member, and a message on it."""
    for path in paths:
        where, inner = "", value
        for key in path:
            if isinstance(key, str) and not isinstance(inner, dict):
                yield key, f"the .{name} has no key {key!r}{where}: that is no mapping but {brief(inner)}"
                break
            if isinstance(inner, dict) and key not in inner:
                yield key, f"the .{name} has no key {key!r}{where}; it has: {shortened(', '.join(inner), 500)}"
                break
            try:
                where, inner = f"{where or ' in '}[{key!r}]", inner[key]
            except (LookupError, TypeError):
                break


def _is_column(name: str) -> bool:
    return name in MEASURED or name.startswith(COLUMN_PREFIX)


def member_value(member: str, contents: Mapping[str, bytes]) -> Any:
    """The text of a member, or what its JSON holds.

    Raises:
        BadCaption: it is absent, not UTF-8 or not JSON.
    """
    if member not in contents:
        raise BadCaption(f"the sample has no .{member}")
    try:
        text = contents[member].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCaption(f"the .{member} is not UTF-8 text: {error}") from None
    if member.split(".")[-1] != "json":
        return text.strip()
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadCaption(f"the .{member} is not JSON: {error}") from None
