"""Weights of STDiT, STDiT2 and STDiT3: published files, and what runs export."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from families.common.library_files import read_tensors
from families.common.weights import WeightsError, read_weights
from families.open_sora.versions import VERSIONS
from modules.stdit import POSITIONS, STDiT, STDiT2
from modules.stdit3 import STDiT3
from modules.stdit_parts import ClipTransformer
from warpcore.safe_json import read_object

EMPTY, ROTATION = "y_embedder.y_embedding", "rope.freqs"
_NEEDED = {"patch": "x_embedder.proj.weight", "text": "y_embedder.y_proj.fc1.weight"}
MODEL, STATES = "model", "running_states.json"
"""In the folder of a checkpoint of the published program (`epoch0-global_step500`): its weights, and its counters."""
AVERAGES = ("ema.safetensors", "ema.pt")
_PARTS = {
    STDiT3: ("spatial_blocks.0.attn.qkv.weight", "temporal_blocks.0.attn.qkv.weight"),
    STDiT2: ("blocks.0.attn_temp.qkv.weight", "t_block_temp.1.weight"),
    STDiT: ("blocks.0.attn_temp.qkv.weight",),
}
"""Tensors that tell the networks apart, the first one whose are all there."""


def kind_of(names: Collection[str]) -> type[ClipTransformer] | None:
    """Which network tensors of these names are of; None for another one."""
    if any(name not in names for name in _NEEDED.values()):
        return None
    return next((kind for kind, parts in _PARTS.items() if all(name in names for name in parts)), None)


def read_network(path: Path, key: str, model_version: str) -> dict[str, Tensor]:
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
        raise WeightsError(f"{key}: {path} is an {VERSIONS[own].title}; write model_version: {own}")
    if (kind := kind_of(tensors)) is not (wanted := VERSIONS[model_version].kind):
        raise WeightsError(
            f"{key}: {path} is an {kind.__name__}, and model_version: {model_version} an {wanted.__name__}; write "
            f"one of {', '.join(name for name, one in VERSIONS.items() if one.kind is kind)}"
        )
    return _with_length(tensors, VERSIONS[model_version].text_length)


def positions_in(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What the tables of an STDiT in a file say of its second place and its second frame, (D,) each; empty where
    published files leave them out."""
    found = [tensors.get(name) for name in POSITIONS]
    return [one[0, 1].float() for one in found if one is not None and one.dim() == 3 and one.shape[1] > 1]


def version_in(path: Path, key: str) -> str | None:
    """The `model_version` of the network in a file or folder; None for another size. Errors as in `read_network`."""
    return _version(_read(path, key))


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors, which are mapped into memory."""
    path = path / MODEL if (path / MODEL).is_dir() else path
    tensors = read_tensors(path, key) if path.is_dir() else read_weights(path, key)
    if kind_of(tensors) is None:
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        missing = next(name for name in (*_NEEDED.values(), *_PARTS[STDiT3]) if name not in tensors)
        raise WeightsError(f"{key}: {path} holds no STDiT, STDiT2 or STDiT3: {missing} is missing, and it has {held}")
    return tensors


def _version(tensors: Mapping[str, Tensor]) -> str | None:
    """The version that tensors are of, by their shapes; None for another one."""
    patches, blocks = tensors[_NEEDED["patch"]], [name for name in tensors if name.endswith(".attn.qkv.weight")]
    if patches.dim() != 5:
        return None
    kind = kind_of(tensors)
    depth = len(blocks) // (2 if kind is STDiT3 else 1)
    known = {"hidden_size": patches.shape[0], "in_channels": patches.shape[1], "depth": depth}
    same = (name for name, one in VERSIONS.items()
            if one.kind is kind and all(one.network[k] == value for k, value in known.items()))  # fmt: skip
    return next(same, None)


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
    """The averaged weights of a checkpoint of the published program. Errors as in `read_network`."""
    return _with_length(_read(run.average, key), VERSIONS[model_version].text_length)
