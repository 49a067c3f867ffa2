"""Files that a tool is about to write: none that is there already, and none twice."""

import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from warpcore.errors import UserError


def check_new(files: Iterable[Path], remedy: str, overwrite: bool = False) -> None:
    """Called with every file that a tool will write, before it writes the first.

    Names that differ only in upper and lower case count as one, as on the file systems of macOS and Windows.

    remedy: what to do where one is there, such as `name another file`. overwrite: a file may be there, but no folder.

    Raises:
        UserError: a file is there already (a link counts, wherever it leads), is named twice, lies in a file, or in a
            folder where nothing may be written.
    """
    named, folders = set(), set()
    for file in files:
        if file.is_dir() or (not overwrite and (file.exists() or file.is_symlink())):
            raise UserError(f"{file} is there already: {remedy}")
        name = unicodedata.normalize("NFC", str(file)).casefold()
        if name in named:
            raise UserError(f"{file} would be written twice: {remedy}")
        named.add(name)
        if parent := _file_in(file.parents):
            raise UserError(f"{file} can't be written: {parent} is a file; {remedy}")
        folders.add(file.parent)
    for folder in {next(there for there in (one, *one.parents) if there.exists()) for one in folders}:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder} may not be written to: change its permissions, or {remedy}")


@contextmanager
def all_or_nothing(target: Path) -> Iterator[None]:
    """What fails inside leaves nothing at `target`, where there is nothing yet, or an empty folder, so that the same
    command can be started again."""
    was_there = target.exists()
    try:
        yield
    except BaseException:
        if target.is_dir() and not target.is_symlink():
            for path in target.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not was_there:
                target.rmdir()
        raise


def check_folder(folder: Path, what: str) -> None:
    """Called with the folder that a tool will write to, before it does anything else.

    what: it will write, for the message.

    Raises:
        UserError: it, or one that it lies in, is a file.
    """
    if file := _file_in((folder, *folder.parents)):
        raise UserError(f"{file} is a file; name a folder to write {what} to")


def _file_in(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists() and not path.is_dir()), None)


def free_folder(name: str) -> Path:
    """The first of NAME, NAME_2, NAME_3, ... that is not there or empty."""
    for number in count(1):
        folder = Path(name if number == 1 else f"{name}_{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
    raise AssertionError("there is always a next number")
