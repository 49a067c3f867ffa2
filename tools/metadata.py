"""Captions and fields from a `metadata.jsonl`, `.csv` or `.parquet`, as Hugging Face's imagefolder has."""

import csv
import io
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow as pa

from warpcore.data.bounded_parquet import open_parquet, read_row_groups
from warpcore.data.index import UNREADABLE
from warpcore.data.picture_files import LeftOut, is_picture, is_video
from warpcore.errors import UserError
from warpcore.files import open_to_read, read_bytes, why_no_file
from warpcore.safe_json import ExcessiveJsonError, parse_json
from warpcore.text import brief, counted, decode_text, read_text, shortened

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "filename", "image", "path")
KEY_COLUMN = "key"
"""img2dataset's: the name of the file without its suffix, unique in the data set."""
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
"""The caption is the first of these that a line has."""
_ROWS_TOGETHER = 1024
"""Of a Parquet file, which become lines of Python."""
NOT_IN_FOLDER = "in the metadata but not in the folder"


@dataclass
class Metadata:
    """What the metadata files of a folder say of its pictures."""

    lines: dict[Path, dict] = field(default_factory=dict)
    """Resolved path of a picture -> its fields; the caption stands under "text"."""
    captions: Counter[str] = field(default_factory=Counter)
    """Number of captions by the column that they are from."""
    other_captions: set[str] = field(default_factory=set)
    """Columns that hold captions of other lines, or further captions of a picture: these are kept as fields."""
    unread: set[str] = field(default_factory=set)
    """Columns of bytes and the like, which are no fields."""
    repeated: int = 0
    """Lines on a picture that has one already."""

    def notes(self) -> list[str]:
        """Lines for a report."""
        notes = []
        if self.captions:
            taken = ", ".join(f"{count} from the column {name!r}" for name, count in self.captions.most_common())
            kept = ", ".join(map(repr, sorted(self.other_captions)))
            notes.append(f"captions in the metadata: {taken}" + (f"; kept as a field: {kept}" if kept else ""))
        if self.unread:
            names = ", ".join(sorted(self.unread))
            notes.append(f"columns of the metadata that hold bytes (or codes inside of lists) are left out: {names}")
        if self.repeated:
            notes.append(
                f"{counted(self.repeated, 'line')} of the metadata came after one on the same picture: only the "
                "last one counts. Several captions are a list in one line of a .jsonl, "
                '"captions": ["...", "..."], with captions_getter: [\'json\', \'lambda j: j["captions"]\']'
            )
        return notes


def read_metadata(folder: Path, listed: Sequence[Path], left_out: LeftOut, given: Path | None = None) -> Metadata:
    """The metadata of a folder: of the file `given`, or else of every metadata file among the `listed` ones.

    File names in it start at its own folder, or at `folder` where that is how they lead to a file; a key may lie in
    any folder. Lines that can't be used, and those that lead to no file, are left out.

    Raises:
        UserError: no such file, it can't be read, or it has no line that can be used; tells what the first one lacks.
    """
    if given is not None:
        if problem := why_no_file(given):
            raise UserError(f"--metadata {given}: it {problem}")
        if given.suffix.lower() not in _READERS:
            raise UserError(f"--metadata {given}: read are {FORMATS}; convert it to one of them")
    found = Metadata()
    files = _Files(folder, listed)
    for file in [given] if given else sorted(path for path in listed if path.name in NAMES):
        used, problem = 0, None
        try:
            for place, line in _READERS[file.suffix.lower()](file, found):
                where = f"{file}, line {place}"
                try:
                    name, path = _picture(line, file.parent, files)
                    line = _with_caption(line, found)
                except _BadLine as bad:
                    left_out.add(f"a line of metadata {bad.kind}", where)
                    problem = problem or f"{where}: {bad}"
                    continue
                used += 1
                if path is None:
                    left_out.add(NOT_IN_FOLDER, shortened(name))
                else:
                    real = Path(os.path.realpath(path))
                    found.repeated += real in found.lines
                    found.lines[real] = line
        except csv.Error as error:
            raise UserError(f"{file} is no CSV that can be read: {error}") from None
        if not used and problem:
            raise UserError(problem)
        if not used and given:
            raise UserError(f"--metadata {given}: it has no line; read are {FORMATS}")
    return found


class _BadLine(Exception):
    """A line that can't be used.

    Args:
        kind: what all lines of this kind have wrong, for a report.
        problem: what this one has wrong.
    """

    def __init__(self, kind: str, problem: str):
        super().__init__(problem)
        self.kind = kind


class _Files:
    """The files of a folder, found by the names that another system gave them."""

    def __init__(self, folder: Path, listed: Sequence[Path]):
        self.folder, self._listed = folder, listed
        self._by_key: dict[str, Path] | None = None
        self._by_folded: dict[str, list[Path]] | None = None

    def named(self, name: str, beside: Path) -> Path | None:
        """The file of a name that starts at `beside`, or else at the folder.

        Names of Windows have backslashes, those of macOS accents that are characters of their own, and in both, case
        does not matter: such a name leads to a file where there is only one that it can mean.
        """
        for place in (beside, self.folder):
            if _exists(path := place / name):
                return path
        if self._by_folded is None:
            self._by_folded = {}
            for path in self._listed:
                self._by_folded.setdefault(_folded(path), []).append(path)
        found = [self._by_folded.get(_folded(place / name.replace("\\", "/"))) for place in (beside, self.folder)]
        return next((paths[0] for paths in found if paths and len(paths) == 1), None)

    def of_key(self, key: str) -> Path | None:
        """The picture or video whose name without its suffix is `key`, in whichever folder."""
        if self._by_key is None:
            self._by_key = {path.stem: path for path in self._listed if is_picture(path) or is_video(path)}
        return self._by_key.get(key)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have: too long, with the character zero, half a character
        return False


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path).casefold())


def _picture(line: dict | _BadLine, beside: Path, files: _Files) -> tuple[str, Path | None]:
    """Take the file name out of a line: the name, and the file that it leads to, where there is one."""
    if isinstance(line, _BadLine):
        raise line
    name = next((line.pop(column) for column in FILE_COLUMNS if line.get(column)), None)
    if name is None and isinstance(key := line.pop(KEY_COLUMN, None), str):
        return key, files.of_key(key)
    if name is None:
        columns = shortened(", ".join(map(str, line)))
        raise _BadLine("without a file name", f"no {FILE_COLUMNS[0]}; it has: {columns}")
    if not isinstance(name, str):
        raise _BadLine("whose file name is not text", f"the file name is not text but {brief(name)}")
    return name, files.named(name, beside)


def _with_caption(line: dict, found: Metadata) -> dict:
    """A line whose caption, from the first of CAPTION_COLUMNS that it has, stands under "text"."""
    columns = [column for column in CAPTION_COLUMNS if line.get(column) is not None]
    if not columns:
        return line
    caption = line.pop(columns[0])
    if not isinstance(caption, str):
        raise _BadLine("whose caption is not text", f"the caption is not text but {brief(caption)}")
    found.captions[columns[0]] += 1
    found.other_captions.update(columns[1:])
    return {**line, "text": caption}


def _read_jsonl(file: Path, _: Metadata) -> Iterator[tuple[int, dict | _BadLine]]:
    for place, text in enumerate(read_text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ExcessiveJsonError as error:
            yield place, _BadLine(str(error).replace("it", "that", 1), str(error))
        except ValueError as error:
            yield place, _BadLine("that is not JSON", f"it is not JSON: {error}")
        else:
            if not isinstance(line, dict):
                wanted = f'expected {{"file_name": ..., "text": ...}}, found {text[:60]!r}'
                line = _BadLine("that is no JSON object", wanted)
            yield place, line


def _read_csv(file: Path, _: Metadata, delimiter: str = ",") -> Iterator[tuple[int, dict | _BadLine]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(decode_text(read_bytes(file), file), newline=""), delimiter=delimiter)
    as_text = {*FILE_COLUMNS, KEY_COLUMN, *CAPTION_COLUMNS}
    for line in reader:
        if surplus := line.pop(None, None):
            yield (
                reader.line_num,
                _BadLine(
                    "with more values than columns",
                    f"{len(surplus)} values more than columns, {surplus[0][:40]!r} is the first; put text with commas "
                    "between double quotes",
                ),
            )
            continue
        values = {name: text for name, text in line.items() if name and text}
        yield reader.line_num, {n: text if n in as_text else _value(text) for n, text in values.items()}


def _value(text: str) -> str | int | float:
    """Numbers of a .csv as numbers, so that filters can compare them; 20_10 is one for Python alone, and is text."""
    for kind in (int, float) if "_" not in text else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_parquet(file: Path, found: Metadata) -> Iterator[tuple[int, dict]]:
    try:
        with open_to_read(file) as opened:
            table, place = open_parquet(opened), 0
            unread = {column.name for column in table.schema_arrow if _is_unread(column.type)}
            found.unread |= unread
            names = [name for name in table.schema_arrow.names if name not in unread]
            groups = (read_row_groups(opened, table, [group], names) for group in range(table.num_row_groups))
            for batch in chain.from_iterable(group.to_batches(_ROWS_TOGETHER) for group in groups):
                columns = {name: _values(column) for name, column in zip(names, batch, strict=True)}
                for values in zip(*columns.values(), strict=True):
                    place += 1
                    yield place, {n: value for n, value in zip(columns, values, strict=True) if value is not None}
    except UNREADABLE as error:
        raise UserError(f"{file} is no Parquet that can be read: {shortened(str(error))}") from None


def _is_unread(kind: pa.DataType, is_inner: bool = False) -> bool:
    """Whether a type holds bytes, or has words of a dictionary inside of it, each of which would be spelled out."""
    if pa.types.is_dictionary(kind):
        return is_inner or _is_unread(kind.value_type, is_inner=True)
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return is_bytes or any(_is_unread(one, is_inner=True) for one in inner)


def _values(column: pa.Array) -> list:
    if not pa.types.is_dictionary(column.type):
        return _as_json(column).to_pylist()
    words = _as_json(column.dictionary).to_pylist()  # each once, in however many rows it stands
    return [None if index is None else words[index] for index in column.indices.to_pylist()]


def _as_json(column: pa.Array) -> pa.Array:
    """A column whose values JSON knows: times as text, decimals as numbers."""
    if pa.types.is_decimal(column.type):
        return column.cast(pa.float64())
    is_time = pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type)
    return column.cast(pa.string()) if is_time else column


_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_jsonl),
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
FORMATS = ".jsonl (a JSON object in each line), .csv, .tsv and .parquet"
