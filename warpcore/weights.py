"""Files of weights."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from warpcore.errors import UserError
from warpcore.files import open_plain

logger = logging.getLogger(__name__)


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of the floating-point tensors; several are separated by commas."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    return ",".join(sorted(kinds))


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with floating-point ones in `dtype`.

    Raises:
        UserError: a finite number is too large for it (float16 ends at 65504).
    """
    made = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in made.items():
        if tensors[name].isfinite().all() and not tensor.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} has numbers too large for {kind}: choose bfloat16 or float32")
    return made


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What safetensors says of a full disk inside becomes the OSError that it was, of `path`."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with `about` as its metadata, that appears whole and that others may read."""
    partial = path.with_suffix(".partial")
    open_plain(partial, "wb").close()
    mode = partial.stat().st_mode  # what the umask says: safetensors' own files are for their owner only
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with disk_errors(partial):
        save_file(whole, partial, metadata=None if about is None else dict(about))
    partial.chmod(mode)
    os.replace(partial, path)


def export_weights(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write the weights of a run in `dtype` (None: as they are), which the metadata of the file then say.

    Where a number is too large for it, they are written as they are, with a warning: a run does not end for that.
    """
    try:
        tensors = tensors if dtype is None else converted(tensors, dtype)
    except UserError as error:
        logger.warning("%s is not converted to export_dtype: %s", path, error)
    write_weights(path, tensors, {**about, "dtype": dtype_name(tensors)})
