"""Weights of STDiT3: published files, and what runs export."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from families.common.library_files import read_tensors
from families.common.weights import WeightsError, read_weights
from families.open_sora.versions import VERSIONS

EMPTY, ROTATION = "y_embedder.y_embedding", "rope.freqs"
_NEEDED = {"patch": "x_embedder.proj.weight", "text": "y_embedder.y_proj.fc1.weight"}
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
