"""Captions and fields of pictures from a `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from warpcore.errors import UserError

NAMES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("text", "caption")


def read_metadata(folder: Path, given: Path | None = None) -> dict[Path, dict]:
    """Resolved path of a picture -> its fields; the caption stands under "text".

    Reads `given`, or else every metadata file in the folder and its sub-folders. File names in it start at its own
    folder, or at `folder` where that is how they lead to a file.

    Raises:
        UserError: no such file, a line that can't be read, or no column with file names.
    """
    if given is not None and not given.is_file():
        raise UserError(f"--metadata {given}: there is no such file")
    files = [given] if given else sorted(path for name in NAMES for path in folder.rglob(name))
    found: dict[Path, dict] = {}
    for file in files:
        lines = _read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file)
        for place, line in lines:
            name = next((line.pop(column) for column in FILE_COLUMNS if line.get(column)), None)
            if not isinstance(name, str):
                raise UserError(f"{file}, line {place}: no {FILE_COLUMNS[0]}; it has: {', '.join(map(str, line))}")
            caption = next((line.pop(column) for column in CAPTION_COLUMNS if line.get(column) is not None), None)
            own = file.parent / name
            path = own if own.exists() or not (folder / name).exists() else folder / name
            found[path.resolve()] = line if caption is None else {**line, "text": caption}
    return found


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict]]:
    with file.open(encoding="utf-8-sig") as lines:
        for place, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise UserError(f"{file}, line {place} is not JSON: {error}") from None
            if not isinstance(line, dict):
                raise UserError(
                    f'{file}, line {place}: expected {{"file_name": ..., "text": ...}}, found {text[:60]!r}'
                )
            yield place, line


def _read_csv(file: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for line in reader:
            yield reader.line_num, {name: _value(text) for name, text in line.items() if name and text}


def _value(text: str) -> str | int | float:
    """Numbers of a .csv as numbers, so that filters can compare them."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
