"""Exported weights: one file for each network, or, of a network too large for one file, several with an index.

    generator.safetensors                      at most `export_file_gb`
    generator-00001-of-00003.safetensors       more: named and indexed as diffusers and transformers do it
    generator.safetensors.index.json

What fits into a file is copied to the CPU of the main process and written while training goes on. What does not is
gathered and written tensor by tensor before training goes on, so that no process ever holds all of it.
"""

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from warpcore.errors import UserError
from warpcore.files import refuse_links, write_whole
from warpcore.processes import Processes
from warpcore.safe_json import read_json
from warpcore.sharded import full
from warpcore.weights import export_weights, exported_dtype, in_file, stored_dtype, why_not, write_tensors

INDEX = ".safetensors.index.json"
"""How the index of a network in several files ends, behind the network's name."""
logger = logging.getLogger(__name__)


Weights = Union[Mapping[str, Tensor], "Parts"]
"""Exported weights of a network: on the CPU of the main process, nothing on others, or in files already."""


def file_metadata(metadata: Mapping[str, str], update: int) -> dict[str, str]:
    """What files of an update say of themselves."""
    return {"format": "pt", **metadata, "update": str(update)}


def take(
    stem: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str],
    dtype: torch.dtype | None,
    limit_bytes: float,
    processes: Processes,
) -> Weights:
    """Take weights out of networks whose training goes on (collective): copied, or, if they are too many, written.

    Args:
        stem: path of their file without its ending. tensors: may be sharded.
        about, dtype: as of `export_weights`. limit_bytes: of a file.
    """
    if sum(stored_bytes(tensor, dtype) for tensor in tensors.values()) > limit_bytes:
        return write_parts(stem, tensors, about, dtype, limit_bytes, processes)
    copies = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if processes.is_main:
            copies[name] = whole.to("cpu", copy=True).contiguous()
    return copies


def publish(
    weights: Weights, stem: Path, about: Mapping[str, str], dtype: torch.dtype | None, copies: Path | None = None
) -> None:
    """Bring weights to the files of a run, and copies of these to another folder of it; see `take`."""
    if isinstance(weights, Parts):
        files = weights.publish()
    else:
        files = [stem.with_name(f"{stem.name}.safetensors")]
        export_weights(files[0], weights, about, dtype)
        remove_others(files[0])
    for file in files if copies else ():
        copies.mkdir(parents=True, exist_ok=True)
        unfinished = copies / f"{file.name}.partial"
        refuse_links(copies.parent, copies, unfinished)
        shutil.copy2(file, unfinished)
        os.replace(unfinished, copies / file.name)


@dataclass
class Parts:
    """The files of a network that wait, under other names, until the checkpoint of their update is whole."""

    path: Path
    """Of the index."""
    index: dict
    partial: dict[Path, Path] = field(default_factory=dict)
    """Where each is now, by its final path."""
    problem: Exception | None = None
    """Why they could not be written."""

    def publish(self) -> list[Path]:
        """Give the files their names, the index last; returns them. Raises what stood in the way of writing them."""
        if self.problem is not None:
            raise self.problem
        for final, partial in self.partial.items():
            os.replace(partial, final)
        write_whole(self.path, json.dumps(self.index, indent=1) + "\n")
        remove_others(self.path, self.partial)
        return [*self.partial, self.path]


def write_parts(
    stem: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str],
    dtype: torch.dtype | None,
    limit_bytes: float,
    processes: Processes,
) -> Parts:
    """Write a network's weights to several files, which wait to be published (collective).

    Args:
        stem: path of the files without their endings. tensors: sharded ones are gathered one at a time.
        about, dtype: as of `export_weights`. limit_bytes: of a file, except for one tensor that is larger.
    """
    if dtype is not None and (problem := processes.first_of(why_not(tensors, dtype))):
        logger.warning("%s is not converted to export_dtype: %s", stem, problem)
        dtype = None
    about = {**about, "dtype": exported_dtype(tensors, dtype)}
    groups = split(tensors, dtype, limit_bytes)
    names = [f"{stem.name}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    files = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    total = {"total_size": sum(stored_bytes(tensor, dtype) for tensor in tensors.values())}
    parts = Parts(stem.with_name(stem.name + INDEX), {"metadata": total | about, "weight_map": files})
    for file, group in zip(names, groups, strict=True):
        final = stem.with_name(file)
        parts.partial[final] = final.with_suffix(".partial")
        whole = _gathered(group, dtype)
        if processes.is_main and parts.problem is None:
            try:
                write_tensors(parts.partial[final], group, about, dtype, lambda name, whole=whole: next(whole))
            except Exception as error:  # raised when the others, which wait for this process to gather, know it too
                parts.problem = error
        deque(whole, maxlen=0)  # what was not written is gathered all the same, and let go of
    return parts


def _gathered(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Whole tensors in the order in which a file stores them, one at a time (collective)."""
    return (full(tensors[name].detach()) for name in in_file(tensors, dtype))


def split(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit_bytes: float) -> list[dict[str, Tensor]]:
    """The tensors of each file, in the order of the network."""
    groups, size = [{}], 0
    for name, tensor in tensors.items():
        own = stored_bytes(tensor, dtype)
        if groups[-1] and size + own > limit_bytes:
            groups, size = [*groups, {}], 0
        groups[-1][name] = tensor
        size += own
    return groups


def stored_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes that a tensor, all of it, takes in a file."""
    return tensor.numel() * stored_dtype(tensor, dtype).itemsize


def remove_others(path: Path, kept: Mapping[Path, object] | None = None) -> None:
    """Remove the files of an earlier export that an export, in a file or by an index, has taken the place of."""
    stem = path.name.removesuffix(INDEX) if path.name.endswith(INDEX) else path.stem
    whole, index = path.with_name(f"{stem}.safetensors"), path.with_name(stem + INDEX)
    for old in (whole, index, *path.parent.glob(f"{stem}-*-of-*.safetensors")):
        if old != path and old not in (kept or {}):
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Index:
    """What the index of a network in several files says."""

    files: dict[str, Path]
    """The file of each tensor."""
    about: dict[str, str]
    """Of the network, as the metadata of a safetensors file."""


def is_index(path: Path) -> bool:
    """Whether a path is named as the index of a network in several files."""
    return path.name.endswith(INDEX)


def read_index(path: Path) -> Index:
    """The index of a network in several files, which lie beside it.

    Raises:
        UserError: it is damaged, or names a file elsewhere.
    """
    try:
        found = read_json(path)
        names, about = found["weight_map"], found.get("metadata") or {}
        files = {name: _beside(path, file) for name, file in names.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the index of a network in several files: {error}") from None
    return Index(files, {key: value for key, value in about.items() if isinstance(value, str)})


def _beside(index: Path, name: str) -> Path:
    if name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"it names {name!r}, which is not a safetensors file beside it")
    return index.with_name(name)
