"""Text from a command line becomes values, each typed by the key that it is for."""

import json
import re
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from warpcore.errors import ConfigError
from warpcore.keys import is_free_text, parts_of
from warpcore.safe_yaml import parse_yaml
from warpcore.text import brief, shortened

_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_BARE_WORD = re.compile(r"\[\s*([^][{},\"'\s]+)\s*\]")


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of `key=value`, `--key=value` and `--key value`."""
    rest = iter(arguments)
    for argument in rest:
        key, equals, text = argument.partition("=")
        if argument.startswith("--"):
            key = key[2:].replace("-", "_")
            text = text if equals else next(rest, None)
        elif not equals:
            raise ConfigError(f"argument {brief(argument)}: write a config file first, then key=value or --key value")
        if not key or text is None:
            raise ConfigError(f"argument {brief(argument)}: write key=value or --key value")
        yield key, text


def read_arguments(kind: type[BaseModel], arguments: list[str], values: dict[str, Any]) -> None:
    """Put what the arguments say into the values that a file gave.

    A key that takes text takes it as it is; all else is YAML. A key that takes a list may be given one value, or be
    repeated.
    """
    given: dict[str, list] = {}
    for key, text in pairs(arguments):
        kinds = parts_of(_annotation(kind, key))
        if (text == "null" and _lists(kinds)) or (text in ("", "null") and types.NoneType in kinds):
            value = None  # as in a file, where a list is never null: no list of the word "null"
        elif _lists(kinds) == kinds - {types.NoneType} and not _in_brackets(text):
            items = set().union(*(parts_of(typing.get_args(one)[0]) for one in _lists(kinds)))
            value = given[key] = [*given.get(key, []), _one_value(items, key, text)]
        elif _in_brackets(text) and _lists(kinds):
            value = _list(kinds, key, text)
        else:
            value = _one_value(kinds, key, text)
        _assign(values, key, value)


def _one_value(kinds: set, key: str, text: str) -> Any:
    """A value of one of these types: text as it is where no other type but a list is among them."""
    others = kinds - {types.NoneType} - _lists(kinds)
    return text if others and all(map(_is_text, others)) else parse_yaml(text, f"{key}={text}")


def _list(kinds: set, key: str, text: str) -> Any:
    of_texts = any(is_free_text(typing.get_args(one)[0]) for one in _lists(kinds))
    word = _BARE_WORD.fullmatch(text.strip())
    if word and of_texts:
        inner = shortened(word[1])
        raise ConfigError(
            f"{key}={shortened(text)}: a list, or a text in brackets? Write {key}='[\"[{inner}]\"]' for the text "
            f"[{inner}], {key}='[\"{inner}\"]' for the text {inner}"
        )
    try:
        return parse_yaml(text, f"{key}={text}")
    except ConfigError as error:
        if not of_texts:
            raise
        one = json.dumps([shortened(text)], ensure_ascii=False)
        raise ConfigError(f"{error}. If it is one text and no list, write {key}={shlex.quote(one)}") from None


def numbers_in(annotation: Any, value: Any) -> Any:
    """A value in which numbers such as `1e-4`, which YAML reads as text, are numbers where a key's type is any."""
    if annotation is Any and isinstance(value, str):
        return float(value) if _EXPONENT.fullmatch(value) else value
    if not isinstance(value, dict | list):
        return value
    inner = {kind: typing.get_args(kind) for kind in parts_of(annotation)}
    if isinstance(value, dict):
        of_values = next((args[1] for kind, args in inner.items() if typing.get_origin(kind) is dict), annotation)
        return {key: numbers_in(of_values, one) for key, one in value.items()}
    of_items = next((args[0] for kind, args in inner.items() if typing.get_origin(kind) is list), annotation)
    return [numbers_in(of_items, one) for one in value]


def _annotation(kind: type[BaseModel], dotted: str) -> Any:
    """The type of a key; of `a.b`, that of the values of the mapping `a`. Any where it is not known."""
    first, *further = dotted.split(".")
    found = kind.model_fields[first].annotation if first in kind.model_fields else Any
    for _ in further:
        mappings = [part for part in parts_of(found) if typing.get_origin(part) is dict]
        found = typing.get_args(mappings[0])[1] if mappings else Any
    return found


def _lists(kinds: set) -> set:
    return {kind for kind in kinds if typing.get_origin(kind) is list}


def _in_brackets(text: str) -> bool:
    return text.strip().startswith("[") and text.strip().endswith("]")


def _is_text(kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in typing.get_args(kind))
    return kind in (str, Path)


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """`a.b=1` sets the key b of the mapping a."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{shortened(dotted)}: {parent} is not a mapping")
        values[parent] = dict(inner)  # an alias may stand for the same one elsewhere
        values = values[parent]
    values[last] = value
