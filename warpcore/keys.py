"""The keys of a configuration as text: for `--help`, docs/configuration.md and messages."""

import inspect
import math
import types
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from textwrap import indent, wrap
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from warpcore.data.storage import expand_home, local_path
from warpcore.errors import UserError
from warpcore.text import brief

MAX_SHOWN = 60
"""Characters of a value in the list of keys that is printed at the start."""


MAX_PATH, MAX_NAME = 4000, 240
"""Characters of a path, and bytes of each name in it: a little less than file systems take, as names get endings."""


class _NamesWeights:
    """Marks a key that names weights."""


class _NamesPlace:
    """Marks text that names a file or folder."""


Place = Annotated[str, _NamesPlace()]
"""Text with the name of a file or folder: where a command line says `[x]`, brackets make a list of it."""
Weights = Annotated[Path, _NamesWeights()]
"""Weights of a network: a file, a folder as diffusers writes it, or a name of the Hugging Face hub, which is
`owner/name` or `owner/name/subfolder`. The families download what is only there, and read it locally."""
S3Url = Annotated[str, Field(pattern=r"^s3://[^/]+(/[^/]+)*/?$")]


def help_text(kind: type[BaseModel], names: Collection[str] | None = None) -> str:
    """Every key that the script uses, or those of `names`, with its type, default and sentence, in sections."""
    lines = []
    for title, all_rows in sections(kind):
        rows = [row for row in all_rows if names is None or row[0] in names]
        lines += ["", title.upper()] if rows else []
        lines += [f"{name} ({of_type}{default})\n{indent(text, '    ')}" for name, of_type, default, text in rows]
    return "\n".join(lines)


def sections(kind: type[BaseModel]) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """The rows of `describe` below titles.

    A section holds the keys that one class, `kind` or a base, is the first to have; its title is the first line of
    that class's docstring.
    """
    owners = {}
    for owner in kind.__mro__:  # a base comes after what overrides its keys
        owners |= dict.fromkeys(inspect.get_annotations(owner), owner)
    found: dict[type, list[tuple[str, str, str, str]]] = {}
    for row in describe(kind):
        found.setdefault(owners[row[0]], []).append(row)
    return [(_title(owner), rows) for owner, rows in found.items()]


def _title(owner: type[BaseModel]) -> str:
    return (owner.__doc__ or "Keys of this script.").partition("\n")[0].removesuffix(".")


def changed_keys(config: BaseModel) -> str:
    """The keys whose values are not their defaults, as `key: value, ...` in lines of at most 119 characters.

    Long values are cut: the run's `config.yaml` has all of them.
    """
    told = []
    for key, value in config.model_dump(mode="json", exclude_defaults=True).items():
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        text = text.splitlines()[0]
        told.append(f"{key}: {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}")
    return "\n".join(wrap(", ".join(told), 119, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def describe(kind: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, sentence) of every key that is used, required ones without a default."""
    rows = []
    for name, field in kind.model_fields.items():
        if name in getattr(kind, "unused", ()):
            continue
        if field.is_required():
            default = ", required"
        else:
            value = field.get_default(call_default_factory=True)
            default = f", default {yaml.safe_dump(_plain(value), default_flow_style=True).splitlines()[0]}"
        rows.append((name, type_name(field.annotation), default, field.description or ""))
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def parts_of(annotation: Any) -> set:
    """The plain types that an optional or bounded one is made of."""
    if typing.get_origin(annotation) is Annotated:
        return parts_of(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return set().union(*map(parts_of, typing.get_args(annotation)))
    return {annotation}


def choices_of(kind: type[BaseModel], key: str) -> list[str]:
    """The values of a key that takes one of a few, as users write them; none for other keys."""
    parts = parts_of(kind.model_fields[key].annotation) - {types.NoneType} if key in kind.model_fields else ()
    literal = all(typing.get_origin(part) is Literal for part in parts)
    return [str(choice) for part in parts for choice in typing.get_args(part)] if literal else []


def type_name(annotation: Any, inner: bool = False) -> str:
    """As users write it. That a key may be null is seen from its default; inner: of what a list holds, it is told."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_weights(annotation) and origin is Annotated:
        return "file | folder | hub name"
    if origin is Annotated:
        return type_name(arguments[0], inner)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_name(part, inner) for part in arguments if inner or part is not types.NoneType)
    if origin:
        return f"{origin.__name__}[{', '.join(type_name(part, inner=True) for part in arguments)}]"
    if annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation))


def weights_keys(kind: type[BaseModel]) -> list[str]:
    """The keys whose type is `Weights`, with or without null."""
    return [
        name for name, field in kind.model_fields.items() if _is_weights(field.annotation) or _marked(field.metadata)
    ]


def _is_weights(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    return _marked(arguments) if typing.get_origin(annotation) is Annotated else any(map(_is_weights, arguments))


def is_free_text(annotation: Any) -> bool:
    """Whether a type takes any text, which may begin and end with brackets; names of places hardly do."""
    marks = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return parts_of(annotation) == {str} and not any(mark is Path or isinstance(mark, _NamesPlace) for mark in marks)


def _marked(metadata: Iterable[Any]) -> bool:
    return any(isinstance(mark, _NamesWeights) for mark in metadata)


def local_paths(kind: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values with `~` expanded in those of path keys, and no URL where a path is needed. Raises UserError."""
    known = dict(values)
    for key, field in kind.model_fields.items():
        value = values.get(key)
        if holds_paths(field.annotation) or Path in field.metadata:
            on_s3 = S3Url in typing.get_args(field.annotation)
            try:
                if isinstance(value, list):
                    known[key] = [_local(one, on_s3) for one in value]
                elif value is not None:
                    known[key] = _local(value, on_s3)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
    return known


def _local(value: Any, on_s3: bool) -> Any:
    """A value of a path key; what is no path is left to the checks of types."""
    if not isinstance(value, str | Path) or (on_s3 and str(value).startswith("s3:")):
        return value
    path = local_path(value)
    if len(str(path)) >= MAX_PATH or any(len(part.encode(errors="surrogateescape")) > MAX_NAME for part in path.parts):
        raise UserError(f"{brief(str(value))} is too long for a path")
    return path if isinstance(value, Path) else expand_home(value)


def holds_paths(annotation: Any) -> bool:
    """Whether a path may stand somewhere in a value."""
    return annotation is Path or any(map(holds_paths, typing.get_args(annotation)))
