"""Weights of STDiT3: published files, and what runs export."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from families.common.library_files import read_tensors
from families.common.weights import WeightsError, read_weights
from families.open_sora.versions import VERSIONS
from warpcore.safe_json import read_object

EMPTY, ROTATION = "y_embedder.y_embedding", "rope.freqs"
_NEEDED = {"patch": "x_embedder.proj.weight", "text": "y_embedder.y_proj.fc1.weight"}
MODEL, STATES = "model", "running_states.json"
"""In the folder of a checkpoint of the published program (`epoch0-global_step500`): its weights, and its counters."""
AVERAGES = ("ema.safetensors", "ema.pt")
_PARTS = ("spatial_blocks.0.attn.qkv.weight", "temporal_blocks.0.attn.qkv.weight")


def is_of_stdit3(names: Collection[str]) -> bool:
    """Whether tensors of these names are an STDiT3's."""
    return all(name in names for name in (*_NEEDED.values(), *_PARTS))


def read_stdit3(path: Path, key: str, model_version: str) -> dict[str, Tensor]:
    """The tensors of the network in a published file or folder, or in one that a run exported.

    The empty text of published weights may have another length than the network's: it is cut, or its last row is
    repeated, as the published program does.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: it is missing, damaged, or of another network than `model_version`.
    """
    tensors = _read(path, key)
    own = _version(tensors)
    if own is not None and own != model_version:
        raise WeightsError(f"{key}: {path} is STDiT3-{own}; write model_version: {own}")
    return _with_length(tensors, VERSIONS[model_version].text_length)


def version_in(path: Path, key: str) -> str | None:
    """The `model_version` of the network in a file or folder; None for another size. Errors as in `read_stdit3`."""
    return _version(_read(path, key))


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors, which are mapped into memory."""
    path = path / MODEL if (path / MODEL).is_dir() else path
    tensors = read_tensors(path, key) if path.is_dir() else read_weights(path, key)
    if not is_of_stdit3(tensors):
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        missing = next(name for name in (*_NEEDED.values(), *_PARTS) if name not in tensors)
        raise WeightsError(f"{key}: {path} holds no STDiT3: {missing} is missing, and it has {held}")
    return tensors


def _version(tensors: Mapping[str, Tensor]) -> str | None:
    """The version that tensors are of, by their shapes; None for another one."""
    patches, blocks = tensors[_NEEDED["patch"]], [name for name in tensors if name.endswith(".attn.qkv.weight")]
    if patches.dim() != 5:
        return None
    known = {"hidden_size": patches.shape[0], "in_channels": patches.shape[1], "depth": len(blocks) // 2}
    return next(
        (name for name, one in VERSIONS.items() if all(one.network[k] == value for k, value in known.items())), None
    )


def _with_length(tensors: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Tensors whose empty text has `length` rows."""
    empty = tensors.get(EMPTY)
    if empty is None or empty.dim() != 2 or not len(empty) or len(empty) == length:
        return dict(tensors)
    rows = torch.cat([empty, empty[-1:].expand(max(length - len(empty), 0), -1)])[:length]
    return dict(tensors) | {EMPTY: rows}


@dataclass(frozen=True)
class PublishedRun:
    """A checkpoint of the published program, beside its weights."""

    folder: Path
    updates: int
    """That were made."""
    average: Path | None
    """The file of the averaged weights."""

    @property
    def left_out(self) -> list[str]:
        """What is in it that a run of ours does not take over."""
        taken = {MODEL, STATES, *AVERAGES}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in taken)


def published_run(path: Path | None, key: str) -> PublishedRun | None:
    """The checkpoint of the published program in a folder; None for anything else.

    Raises:
        UserError: nothing says how many updates were made.
    """
    if path is None or not (path / MODEL).is_dir():
        return None
    states = read_object(path / STATES, f"{key}: {path / STATES}") if (path / STATES).is_file() else {}
    named = re.search(r"global_step(\d{1,9})$", path.name)
    updates = states.get("global_step", int(named[1]) if named else None)
    if type(updates) is not int or not 0 <= updates < 2**31:
        raise WeightsError(f"{key}: {path} does not say how many updates were made: its name ends with no "
                           f"global_step500, and {STATES} has no global_step")  # fmt: skip
    return PublishedRun(path, updates, next((path / name for name in AVERAGES if (path / name).is_file()), None))


def read_average(run: PublishedRun, key: str, model_version: str) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint of the published program. Errors as in `read_stdit3`."""
    return _with_length(_read(run.average, key), VERSIONS[model_version].text_length)
