"""The table of contents of a distributed checkpoint (DCP's `.metadata`), a pickle that anyone may have written.

What it describes is read into stand-ins that know no code, checked, and only then made DCP's own: no class or function
of a library is in reach of the pickle, which could change it for the whole process (opcode BUILD).
"""

import pickle
from collections.abc import ItemsView, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from warpcore.errors import UserError
from warpcore.files import open_to_read

MAX_STATE_BYTES = 2**27
"""Of `state.json`, which has a line's worth for each row that waits in one of the plan's lanes."""
MAX_TABLE_BYTES = 2**29
"""Of `.metadata`: each part of a tensor takes about 150 bytes."""
_DCP = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_DCP, "Metadata"), (_DCP, "TensorStorageMetadata"), (_DCP, "TensorProperties"), (_DCP, "ChunkStorageMetadata"),
    (_DCP, "MetadataIndex"), (_DCP, "StorageMeta"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}  # fmt: skip
_VALUES = {
    (_DCP, "_MEM_FORMAT_ENCODING"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}  # fmt: skip
"""Called by the pickle for values that are not needed."""
_DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


class TableError(ValueError):
    """It is no table of contents of tensors: the message says why."""


def read_table(path: Path) -> Metadata:
    """The table in a file.

    Raises:
        OSError, UserError: the file cannot be read.
        TableError: it holds something else than descriptions of stored tensors.
    """
    try:
        with open_to_read(path) as file:
            found = _Unpickler(file).load()
        return _checked(found)
    except (OSError, UserError, TableError):
        raise
    except Exception as error:  # whatever a damaged pickle may raise
        raise TableError(f"{type(error).__name__}: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, made for this file alone."""
        if (module, name) in _CLASSES:
            return type(name, (_StandIn,), {})
        if (module, name) in _VALUES:
            return lambda *_: None
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise TableError(f"it asks for {module}.{name}, which describes no tensor")


class _StandIn:
    """Has the attributes that a pickle gives it."""

    def __setstate__(self, state: dict[str, Any] | tuple) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"dtype": state[0]})  # TensorProperties' is a tuple


def _checked(found: Any) -> Metadata:
    tensors = {_text(name): _tensor(entry, name) for name, entry in _mapping(found.state_dict_metadata)}
    stored = {_place(index): _stored(info) for index, info in _mapping(found.storage_data)}
    for name, tensor in tensors.items():
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) < prod(tensor.size):
            raise TableError(f"parts of {name} are missing")
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in stored:
                raise TableError(f"it does not say where {name} is")
    return Metadata(tensors, storage_data=stored)


def _tensor(entry: Any, name: str) -> TensorStorageMetadata:
    if type(entry).__name__ != "TensorStorageMetadata":
        raise TableError(f"{name} is not a tensor, so it is not loaded")
    dtype = entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TableError(f"{name} has no dtype")
    chunks = [ChunkStorageMetadata(_size(chunk.offsets), _size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype), _size(entry.size), chunks)


def _place(index: Any) -> MetadataIndex:
    offset = getattr(index, "offset", None)
    return MetadataIndex(_text(index.fqn), None if offset is None else _size(offset), getattr(index, "index", None))


def _stored(info: Any) -> _StorageInfo:
    return _StorageInfo(_text(info.relative_path), *_size((info.offset, info.length)))


def _mapping(value: Any) -> ItemsView:
    if not isinstance(value, dict):
        raise TableError("it is no mapping")
    return value.items()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TableError(f"{value!r} is no name")
    return value


def _size(values: Sequence[int]) -> torch.Size:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TableError("a size is none")
    return torch.Size(values)
