"""safetensors files that anyone may have written: their headers are bounded."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER_BYTES = 2**24
"""A network of billions of numbers takes 1 MB, and what kohya's scripts note some more; of 100 MB, which safetensors
itself allows, two million empty tensors could be made."""


def open_weights(path: Path | str) -> safe_open:
    """`safetensors.safe_open(path, "pt")`, for a regular file.

    Raises:
        SafetensorError: it is no such file, or its header is larger than that of any network.
        OSError: it can't be read.
    """
    _check_header(path)
    return safe_open(path, "pt")


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises as `open_weights`."""
    _check_header(path)
    return load_file(path)


def _check_header(path: Path | str) -> None:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise SafetensorError(f"its header says that it has {size} bytes, more than {MAX_HEADER_BYTES >> 20} MiB")
