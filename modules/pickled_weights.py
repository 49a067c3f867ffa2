"""Weights in PyTorch's own files: no code in them is run, and they stand for no more numbers than they hold."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_REPEATED_BYTES = 2**20
"""Of a tensor that repeats the numbers of a smaller storage: kilobytes could stand for petabytes."""


def read_pickled(path: Path, map_location: str = "cpu", mmap: bool = False) -> dict[Any, Any]:
    """The mapping in a `.pt`, `.pth`, `.bin` or `.ckpt` file, or the one it has as `state_dict` or, where it holds no
    tensors itself, as `ema`: the average that a training was published by.

    mmap: tensors stay on the disk until they are copied, where the file's format allows it.

    Raises ValueError, which says what the file is instead.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        with torch.sparse.check_sparse_tensor_invariants():  # one whose places lie outside of it would crash
            state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a broken archive may raise, or one with code
        raise ValueError(_reason(error)) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    elif isinstance(state, dict) and isinstance(state.get("ema"), dict) and not _has_tensors(state):
        state = state["ema"]
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} instead of tensors by name")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ValueError(f"{name} is a sparse tensor")
        if isinstance(tensor, Tensor) and tensor.nbytes > max(tensor.untyped_storage().nbytes(), MAX_REPEATED_BYTES):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, for which the file holds too few numbers")
    return state


def _has_tensors(state: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def read_pickled_tensors(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of such a file by name; what else it notes (`epoch`, `global_step`) is left out.

    Raises ValueError: see `read_pickled`; or there are none.
    """
    state = read_pickled(path, mmap=mmap)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        inside = sorted({str(name)[:40] for name, value in state.items() if isinstance(value, dict)})
        hint = f"; there are mappings inside: {', '.join(inside[:5])}" if inside else ""
        raise ValueError(f"it holds no tensors by name{hint}")
    return tensors


def _reason(error: Exception) -> str:
    """Not torch's own words where it advises to run the code."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"it is damaged, or holds code beside tensors{f' ({found[1]})' if found else ''}, which is never run; "
            "name the .safetensors file of the same weights"
        )
    return f"it is damaged, or no PyTorch file: {str(error).partition(chr(10))[0] or type(error).__name__}"
