"""What arguments of the tools can be, for argparse."""

import argparse
import re
from pathlib import Path

from warpcore.data import storage
from warpcore.errors import UserError


def local_path(text: str) -> Path:
    """A path of this machine, and no URL."""
    if re.match(r"[a-z]\w*=", text) and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text} stands where a path is expected: keys follow after all the paths (./{text} for a path)"
        )
    try:
        return storage.local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return int(text)
