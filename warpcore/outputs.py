"""Files that a tool is about to write: none that is there already, and none twice."""

import unicodedata
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from warpcore.errors import UserError


def check_new(files: Iterable[Path], remedy: str) -> None:
    """Called with every file that a tool will write, before it writes the first.

    Names that differ only in upper and lower case count as one, as on the file systems of macOS and Windows.

    remedy: what to do where one is there, such as `name another file`.

    Raises:
        UserError: a file is there already (a link counts, wherever it leads), is named twice, or lies in a file.
    """
    named: set[str] = set()
    for file in files:
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} is there already: {remedy}")
        name = unicodedata.normalize("NFC", str(file)).casefold()
        if name in named:
            raise UserError(f"{file} would be written twice: {remedy}")
        named.add(name)
        if parent := next((parent for parent in file.parents if parent.exists() and not parent.is_dir()), None):
            raise UserError(f"{file} can't be written: {parent} is a file; {remedy}")


def free_folder(name: str) -> Path:
    """The first of NAME, NAME_2, NAME_3, ... that is not there or empty."""
    for number in count(1):
        folder = Path(name if number == 1 else f"{name}_{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
    raise AssertionError("there is always a next number")
