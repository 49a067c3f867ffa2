"""safetensors files that anyone may have written: their headers are bounded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER_BYTES = 2**24
"""A network of billions of numbers takes 1 MB, and what kohya's scripts note some more; of 100 MB, which safetensors
itself allows, two million empty tensors could be made."""

_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}
"""How files begin that are there in the place of weights, and what they are."""


def open_weights(path: Path | str) -> safe_open:
    """`safetensors.safe_open(path, "pt")`, for a regular file.

    Raises:
        SafetensorError: it is no such file, or its header is larger than that of any network.
        OSError: it can't be read.
    """
    _check_header(path)
    with _explained():
        return safe_open(path, "pt")


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises as `open_weights`."""
    _check_header(path)
    with _explained():
        return load_file(path)


@contextmanager
def _explained() -> Iterator[None]:
    """Inside, what safetensors says of a header is told with what to do."""
    try:
        yield
    except SafetensorError as error:
        if "header" not in str(error):
            raise
        raise SafetensorError(f"it is cut off or damaged: download or copy it again ({error})") from error


def _check_header(path: Path | str) -> None:
    with open(path, "rb") as file:
        start = file.read(64)
    for beginning, what in _NO_WEIGHTS.items():
        if start.lower().startswith(beginning):
            raise SafetensorError(f"it is {what}, not the file itself: download that")
    size = int.from_bytes(start[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise SafetensorError(f"its header says that it has {size} bytes, more than {MAX_HEADER_BYTES >> 20} MiB")
