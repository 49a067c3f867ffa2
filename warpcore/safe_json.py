"""JSON that anyone may have written: bounded in size and depth, and whatever is wrong with it is a ValueError."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.text import brief, decode_text

MAX_JSON_BYTES = 2**25
"""32 MiB, of which values take up to 20 times as much memory."""
MAX_BRACKETS = 2**21
"""Lists and mappings take the most memory and time: about a second for this number."""
MAX_LEVELS = 100
"""Of lists and mappings inside of each other: whatever is done with a value that was read goes that deep."""


class ExcessiveJsonError(ValueError):
    """It is nested too deeply, too long, or of too many parts: the message says that of "it"."""


def parse_json(content: str | bytes, max_bytes: int = MAX_JSON_BYTES, each_key_once: bool = False) -> Any:
    """The value that JSON spells; of a key that is given twice the last value, or with `each_key_once` an error.

    Raises:
        ExcessiveJsonError: it is nested too deeply, has too many parts, or more than `max_bytes` (characters of text).
        ValueError: it is no JSON.
    """
    if len(content) > max_bytes:
        raise ExcessiveJsonError(f"it is longer than {max_bytes >> 20} MiB")
    brackets = sum(map(content.count, ("[", "{") if isinstance(content, str) else (b"[", b"{")))
    if brackets > MAX_BRACKETS:
        raise ExcessiveJsonError(f"it has more than {MAX_BRACKETS:,} lists and mappings")
    try:
        value = json.loads(content, object_pairs_hook=keys_once if each_key_once else None)
    except RecursionError:
        raise ExcessiveJsonError("it is nested too deeply") from None
    if brackets > MAX_LEVELS and _levels_exceed(value):
        raise ExcessiveJsonError("it is nested too deeply")
    return value


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook` takes it. Raises ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{brief(twice)} is given twice")
    return found


def load_json(file: BinaryIO, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """`parse_json` of the rest of an open file, of which no more than `max_bytes` are held."""
    return parse_json(file.read(max_bytes + 1), max_bytes)


def read_json(path: Path) -> Any:
    """The value in a file of UTF-8 or UTF-16 (see `decode_text`).

    Raises:
        EncodingError, NotAFileError: the file is no text, or no file; the message names it.
        ValueError: see `parse_json`.
    """
    with open_to_read(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    return parse_json(content if len(content) > MAX_JSON_BYTES else decode_text(content, path))


def parse_object(content: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object that a text spells.

    Raises:
        UserError: it spells none; the message begins with `what`.
    """
    return _object(partial(parse_json, content), what)


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, see `read_json`.

    Raises:
        UserError: it holds none; the message begins with `what`, or names the file.
    """
    return _object(partial(read_json, path), what)


def _object(read: Callable[[], Any], what: str) -> dict[str, Any]:
    try:
        value = read()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} is no JSON object")
    return value


def _levels_exceed(value: Any) -> bool:
    """Whether there are more than MAX_LEVELS lists and mappings inside of each other."""
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
