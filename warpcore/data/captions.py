"""What a sample's caption is: `captions_getter`. Workers import this, so it stays light."""

import json
from dataclasses import dataclass
from typing import Any

from warpcore.data.expressions import Expression, compile_expression
from warpcore.errors import UserError


class BadCaption(ValueError):
    """This sample has no usable caption; the message is the reason."""


@dataclass(frozen=True)
class CaptionGetter:
    """`captions_getter: ['json', 'lambda j: j["caption"]']`: from the bytes of a member to the caption. Picklable."""

    member: str
    expression: Expression

    @classmethod
    def parse(cls, entry: Any) -> "CaptionGetter":
        """From the config's `[member, expression]`."""
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(
                f"captions_getter: expected [member, expression], such as ['txt', identity], found {entry!r}"
            )
        expression = compile_expression(entry[1])
        if expression.num_arguments != 1:
            raise UserError(f"captions_getter: {expression.text!r} takes {expression.num_arguments} values, not 1")
        return cls(entry[0].lower().lstrip("."), expression)

    def __call__(self, content: bytes) -> str:
        """The caption in the content of the member, without surrounding white space.

        Raises:
            BadCaption: not UTF-8, not JSON, the expression fails on it, or its result is not text.
        """
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadCaption(f"the .{self.member} is not UTF-8 text: {error}") from None
        value: Any = text.strip()
        if self.member.split(".")[-1] == "json":
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadCaption(f"the .{self.member} is not JSON: {error}") from None
        try:
            caption = self.expression(value)
        except KeyError as error:
            known = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise BadCaption(f"the .{self.member} has no key {error}; it has: {known}") from None
        except Exception as error:
            raise BadCaption(f"captions_getter {self.expression.text!r}: {type(error).__name__}: {error}") from None
        if not isinstance(caption, str):
            raise BadCaption(f"the caption is not text but {type(caption).__name__}: {str(caption)[:80]!r}")
        return caption.strip()
