"""What arguments of the tools can be, for argparse."""

import argparse
import math
import re
from pathlib import Path

from warpcore.data import storage
from warpcore.errors import UserError
from warpcore.text import brief


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


def positive(text: str, most: int = 1_000_000_000) -> int:
    """A whole number above 0, up to `most`."""
    if not re.fullmatch("[0-9]{1,18}", text) or not 0 < int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to {most}, found {brief(text)}")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {brief(text)}")
    return int(text)


def process_count(text: str) -> int:
    """A number of processes, of one machine or of a run on many."""
    return positive(text, 100_000)


def worker_count(text: str) -> int:
    """A number of processes that a tool starts on this machine."""
    return positive(text, 1024)


def amount(text: str) -> float:
    """A number above 0, such as GiB or seconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {brief(text)}")
    return number
