"""Captions and fields of pictures from a `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from warpcore.data.picture_files import is_picture
from warpcore.errors import UserError
from warpcore.files import read_bytes, why_no_file
from warpcore.text import decode_text, read_text

NAMES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "image", "path")
KEY_COLUMN = "key"
"""img2dataset's: the name of the file without its suffix, unique in the data set."""
CAPTION_COLUMNS = ("text", "caption")


def read_metadata(folder: Path, listed: Sequence[Path], given: Path | None = None) -> dict[Path, dict]:
    """Resolved path of a picture -> its fields; the caption stands under "text".

    Reads `given`, or else every metadata file among the `listed` files of the folder and its sub-folders. File names
    in it start at its own folder, or at `folder` where that is how they lead to a file; a key may lie in any folder.

    Raises:
        UserError: no such file, a line that can't be read, a caption that is not text, or no column with file names.
    """
    if given is not None and (problem := why_no_file(given)):
        raise UserError(f"--metadata {given}: it {problem}")
    files = [given] if given else sorted(path for path in listed if path.name in NAMES)
    found: dict[Path, dict] = {}
    by_key: dict[str, Path] = {}
    for file in files:
        try:
            for place, line in _read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file):
                if not by_key and KEY_COLUMN in line:
                    by_key = {path.stem: path for path in listed if is_picture(path)}
                path = _picture(line, f"{file}, line {place}", file.parent, folder, by_key)
                found[Path(os.path.realpath(path))] = _with_caption(line, f"{file}, line {place}")
        except csv.Error as error:
            raise UserError(f"{file} is no CSV that can be read: {error}") from None
    return found


def _picture(line: dict, where: str, beside: Path, folder: Path, by_key: dict[str, Path]) -> Path:
    """Take the file name out of a line: the picture that it names, whether there is one or not."""
    name = next((line.pop(column) for column in FILE_COLUMNS if line.get(column)), None)
    if name is None and isinstance(key := line.pop(KEY_COLUMN, None), str):
        return by_key.get(key, folder / key)
    if not isinstance(name, str):
        raise UserError(f"{where}: no {FILE_COLUMNS[0]}; it has: {', '.join(map(str, line))}")
    own = beside / name
    return own if own.exists() or not (folder / name).exists() else folder / name


def _with_caption(line: dict, where: str) -> dict:
    caption = next((line.pop(column) for column in CAPTION_COLUMNS if line.get(column) is not None), None)
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: the caption is not text but {str(caption)[:60]}")
    return line if caption is None else {**line, "text": caption}


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict]]:
    for place, text in enumerate(read_text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}, line {place} is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise UserError(f'{file}, line {place}: expected {{"file_name": ..., "text": ...}}, found {text[:60]!r}')
        yield place, line


def _read_csv(file: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(decode_text(read_bytes(file), file), newline=""))
    as_text = {*FILE_COLUMNS, KEY_COLUMN, *CAPTION_COLUMNS}
    for line in reader:
        if surplus := line.pop(None, None):
            raise UserError(
                f"{file}, line {reader.line_num}: {len(surplus)} values more than columns, {surplus[0][:40]!r} is "
                "the first; put text with commas between double quotes"
            )
        values = {name: text for name, text in line.items() if name and text}
        yield reader.line_num, {n: text if n in as_text else _value(text) for n, text in values.items()}


def _value(text: str) -> str | int | float:
    """Numbers of a .csv as numbers, so that filters can compare them."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
