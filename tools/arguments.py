"""What arguments of the tools can be, for argparse."""

import argparse
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from warpcore.data import storage
from warpcore.errors import UserError


def local_path(text: str) -> Path:
    """A path of this machine, and no URL."""
    try:
        return storage.local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return int(text)


def refuse_existing(paths: Iterable[Path]) -> None:
    """Raise UserError before anything is written, where a file to write exists, or two of them have one name.

    Names that differ only in upper and lower case count as one, as on the file systems of macOS and Windows.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path} is there already: name another file")
        other = seen.setdefault(unicodedata.normalize("NFC", str(path)).casefold(), path)
        if other is not path:
            raise UserError(f"{other} and {path} would be the same file: nothing was written")
