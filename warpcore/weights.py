"""Files of weights, written tensor by tensor."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from warpcore.errors import UserError
from warpcore.files import replacing, writing
from warpcore.sharded import local

logger = logging.getLogger(__name__)

_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls dtypes, in the order in which its own writer stores them: each is aligned."""
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of the floating-point tensors; several are separated by commas."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    return ",".join(sorted(kinds))


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is stored in where floating-point ones are stored in `dtype` (None: as they are)."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Check that floating-point tensors, or this process's part of them, can be stored in `dtype`, one by one.

    Raises:
        UserError: a finite number is too large for it (float16 ends at 65504).
    """
    for name, tensor in tensors.items():
        own = local(tensor.detach())
        if stored_dtype(own, dtype) != own.dtype and own.isfinite().all() and not own.to(dtype).isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} has numbers too large for {kind}: choose bfloat16 or float32")


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with floating-point ones in `dtype`.

    Raises:
        UserError: a finite number is too large for it.
    """
    check_range(tensors, dtype)
    return {name: tensor.to(stored_dtype(tensor, dtype)) for name, tensor in tensors.items()}


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


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file that appears whole and that others may read; memory holds one tensor at a time.

    about: its metadata. dtype: of floating-point tensors; by default they stay as they are.
    """
    partial = path.with_suffix(".partial")
    with replacing(path, partial):
        write_tensors(partial, tensors, about, dtype)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    values: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a safetensors file in place, as `write_weights`.

    values: gives a tensor when it is written, where `tensors` only say its shape; called in the order of `in_file`.
    """
    entries, end = {}, 0
    for name in in_file(tensors, dtype):
        kind, begin = stored_dtype(tensors[name], dtype), end
        end += tensors[name].numel() * kind.itemsize
        entries[name] = {"dtype": _NAMES[kind], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    notes = {} if about is None else {"__metadata__": dict(about)}
    header = json.dumps(notes | entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with writing(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in entries:
            tensor = (values or tensors.__getitem__)(name).detach()
            file.write(content(tensor.to("cpu", stored_dtype(tensor, dtype))))
            del tensor  # before the next one is gathered


def in_file(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[str]:
    """The names of tensors in the order in which a file stores them."""
    return sorted(tensors, key=lambda name: (_ORDER[stored_dtype(tensors[name], dtype)], name))


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the CPU; of a contiguous one they are not copied."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def export_weights(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write the weights of a run in `dtype` (None: as they are), which the metadata of the file then say.

    Where a number is too large for it, they are written as they are, with a warning: a run does not end for that.
    """
    if dtype is not None and (problem := why_not(tensors, dtype)):
        logger.warning("%s is not converted to export_dtype: %s", path, problem)
        dtype = None
    write_weights(path, tensors, {**about, "dtype": exported_dtype(tensors, dtype)}, dtype)


def why_not(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """Why tensors, or this process's part of them, can't be stored in `dtype`."""
    try:
        check_range(tensors, dtype)
    except UserError as error:
        return str(error)
    return None


def exported_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    """What the metadata of a file that stores tensors in `dtype` say of them, as `dtype_name`."""
    shapes = {
        name: torch.empty(0, dtype=stored_dtype(tensor, dtype), device="meta") for name, tensor in tensors.items()
    }
    return dtype_name(shapes)
