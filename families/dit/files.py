"""Weights files of DiT and Latte: published ones, those of Open-Sora's names, and what runs export."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from families.common.library_files import CONFIG_KEY, check_layers
from families.common.weight_files import metadata_of
from families.common.weights import WeightsError, read_weights
from families.dit.versions import VERSIONS
from modules.dit import POSITIONS
from warpcore.safe_json import parse_object

HEADS = {version.network["hidden_size"]: version.network["num_heads"] for version in VERSIONS.values()}
"""Attention heads, which no tensor tells, of the published widths."""
TABLE = "y_embedder.embedding_table.weight"
TABLES = (*POSITIONS, "pos_embed_spatial", "pos_embed_temporal")
"""Tables of positions, also as Open-Sora calls them: they follow from the sizes."""
OF_FRAMES = TABLES[1::2]
"""Those of frames, in files of clips; Open-Sora's of pictures have one of a single frame."""
_NEEDED = {"patch": "x_embedder.proj.weight", "classes": TABLE, "out": "final_layer.linear.weight"}


class DitFile(NamedTuple):
    """A network in a file."""

    tensors: dict[str, Tensor]
    """Without tables of positions."""
    config: dict[str, Any]
    """Constructor numbers of `modules.dit.DiT`; `num_frames` is of a Latte alone."""


def is_of_dit(names: Collection[str]) -> bool:
    """Whether tensors of these names are a DiT's, or a Latte's."""
    return TABLE in names and any(name.endswith("adaLN_modulation.1.weight") for name in names)


def is_of_latte(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether tensors of these shapes, by name, are a Latte's."""
    return is_of_dit(shapes) and (POSITIONS[1] in shapes or _length(shapes, OF_FRAMES) > 1)


def read_dit(path: Path, key: str) -> DitFile:
    """The network in a .pt or .safetensors file; no code in it is run.

    Raises:
        WeightsError: it is missing, damaged, or of another network.
    """
    state = read_weights(path, key)
    tensors = {name: tensor for name, tensor in state.items() if name not in TABLES}
    patches = tensors.get(_NEEDED["patch"])
    if patches is not None and patches.dim() == 5 and patches.shape[2] == 1:  # of Open-Sora: patches of one frame
        tensors[_NEEDED["patch"]] = patches[:, :, 0]
    if missing := [name for name in _NEEDED.values() if name not in tensors]:
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise WeightsError(f"{key}: {path} holds no DiT: {missing[0]} is missing, and it has {held}")
    said = metadata_of(path).get(CONFIG_KEY)
    config = parse_object(said, f"{key}: the config of {path}") if said is not None else None
    config = _numbers_of(tensors, state, path, key) if config is None else config
    check_layers({"num_layers": config.get("depth", 0)}, "DiT", key)
    return DitFile(tensors, config)


def dit_numbers(path: Path, key: str) -> dict[str, Any]:
    """The constructor numbers of the network in a file; its tensors are not copied."""
    return read_dit(path, key).config


def _numbers_of(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, key: str) -> dict[str, Any]:
    """The constructor numbers that the shapes of tensors tell."""
    problem = f"{key}: {path} holds no DiT"
    shapes = {name: tuple(tensors[tensor].shape) for name, tensor in _NEEDED.items()}
    if wrong := [one for one, shape in shapes.items() if len(shape) != (4 if one == "patch" else 2) or 0 in shape]:
        raise WeightsError(f"{problem}: {_NEEDED[wrong[0]]} is of the shape {shapes[wrong[0]]}")
    width, channels, patch, _ = shapes["patch"]
    if width not in HEADS:
        raise WeightsError(f"{problem} of a published width, but one of {width}; published are {sorted(HEADS)}")
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    places, frames = (_length({name: one.shape for name, one in state.items()}, tables)
                      for tables in (TABLES[::2], OF_FRAMES))  # fmt: skip
    return {
        "hidden_size": width, "num_heads": HEADS[width], "patch_size": patch, "in_channels": channels,
        "depth": max(blocks, default=-1) + 1, "num_classes": shapes["classes"][0] - 1,
        "learn_sigma": shapes["out"][0] == 2 * channels * patch**2,
    } | ({"input_size": math.isqrt(places) * patch} if places else {}) | (
        {"num_frames": frames} if POSITIONS[1] in state or frames > 1 else {}
    )  # fmt: skip


def _length(shapes: Mapping[str, Sequence[int]], tables: Sequence[str]) -> int:
    """N of the first of the tables (1, N, D) that is there; 0 where there is none."""
    return next((shapes[name][1] for name in tables if len(shapes.get(name, ())) == 3), 0)
