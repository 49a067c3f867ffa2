"""What is wrong with a configuration, as a user wrote it."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from warpcore.keys import type_name


def explain(kind: type[BaseModel], mistake: Any, files: Mapping[str, Path]) -> str:
    """A line about one of pydantic's errors: the key, what was found, in which of the `files`, and what to write."""
    location = [str(part) for part in mistake["loc"]]
    key = location[0] if location else ""
    where = f" in {files[key]}" if key in files else ""
    match mistake["type"]:
        case "extra_forbidden" if len(location) > 1:
            return f"{'.'.join(location)}: unknown key{where}"
        case "missing" if len(location) > 1 and isinstance(mistake["loc"][-1], str):
            return f"{'.'.join(location)}: this key is required{where}"
        case "extra_forbidden":
            near = difflib.get_close_matches(key, kind.model_fields, n=1)
            return f"{key}: unknown key{where}" + (f"; did you mean {near[0]}?" if near else "; --help lists all keys")
        case "missing" if len(location) == 1:
            return f"{key}: this key is required. {kind.model_fields[key].description or ''}"
        case "value_error":
            reason = str(mistake["ctx"]["error"])
        case _:
            reason = mistake["msg"] + ("; put it in quotes" if mistake["type"] == "string_type" else "")
    if not key:
        return reason
    if mistake["input"] is None and len(location) == 1 and kind.model_fields[key].default in ([], {}):
        return f"{key}: found null{where}; write {kind.model_fields[key].default} for none"
    wanted = type_name(kind.model_fields[key].annotation) if key in kind.model_fields else ""
    return f"{key}: found {mistake['input']!r}{where}, but {reason[0].lower() + reason[1:]} (expected: {wanted})"
