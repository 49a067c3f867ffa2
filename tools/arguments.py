"""What arguments of the tools can be, for argparse."""

import argparse
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
