"""The denoiser of PixArt-alpha wherever a config may say that it is.

a pipeline of diffusers    its folder transformer
one network's folder       config.json and safetensors
a published file           PixArt-XL-2-512x512.pth: published names
one network's file         generator.safetensors: diffusers' names, as runs export them
"""

import math
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from families.common.library_files import CONFIG, Component, class_names, component_folder, read_config, read_tensors
from families.common.weight_source import PIPELINE as INDEX
from families.common.weights import WeightsError, existing_file, read_weights
from families.dit.pixart_names import EMPTY, LIBRARY_EMPTY, POSITIONS, library_tensors
from families.dit.pixart_versions import VERSIONS, numbers
from warpcore.errors import UserError
from warpcore.exports import is_index
from warpcore.safe_json import read_object
from warpcore.text import brief, shortened

TRANSFORMER, PIPELINE = "PixArtTransformer2DModel", "PixArtAlphaPipeline"
HEADS = {v.network["cross_attention_dim"]: v.network["num_attention_heads"] for v in VERSIONS.values()}
"""Attention heads, which no tensor tells, of the published widths."""
_PUBLISHED = ("blocks.0.cross_attn.kv_linear.weight", "y_embedder.y_proj.fc1.weight", "final_layer.scale_shift_table")
_LIBRARY = (
    "transformer_blocks.0.scale_shift_table",
    "caption_projection.linear_1.weight",
    "adaln_single.linear.weight",
)


def is_of_pixart(names: Collection[str]) -> bool:
    """Whether tensors of these names are a PixArt's, in published names or in diffusers'."""
    return all(name in names for name in _LIBRARY) or (
        all(name in names for name in _PUBLISHED) and "blocks.0.attn_temp.qkv.weight" not in names
    )


def find_denoiser(path: Path, key: str) -> Component:
    """The denoiser of a file or folder; see this module.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    if path.is_dir():
        folder = component_folder(path, "transformer")
        config = read_config(folder, key)
        if config is None:
            raise UserError(f"{key}: {path} is no folder with a PixArt-alpha: it has neither transformer/{CONFIG} nor "
                            f"{CONFIG}")  # fmt: skip
        _check_pipeline(folder.parent, key)
        _check_config(config, folder, key)
        return Component(folder, partial(read_tensors, folder, key), config)
    existing_file(path, key)
    config = read_config(path, key) if path.suffix == ".safetensors" or is_index(path) else None
    if config is not None:
        _check_config(config, path, key)
        return Component(path, partial(read_tensors, path, key), config)
    state = read_weights(path, key)
    if missing := [name for name in _PUBLISHED if name not in state]:
        held = ", ".join(sorted(state)[:3]) or "nothing"
        raise WeightsError(f"{key}: {path} holds no PixArt-alpha: {missing[0]} is missing, and it has {held}")
    tensors = library_tensors(state)
    return Component(path, lambda: tensors, _numbers_of(tensors, state, path, key))


def _check_pipeline(folder: Path, key: str) -> None:
    """Raise WeightsError where a folder is another pipeline: PixArt-Sigma's denoiser has the same numbers, but another
    autoencoder and longer texts."""
    index = folder / INDEX
    named = class_names(read_object(index, f"{key}: {index}")) if index.is_file() else set()
    if named and PIPELINE not in named:
        raise WeightsError(f"{key}: {folder} is a {shortened(sorted(named)[0])}, no {PIPELINE}")


def _check_config(config: Mapping[str, Any], path: Path, key: str) -> None:
    """Raise WeightsError where a config is that of another network."""
    named = class_names(config)
    if (named and TRANSFORMER not in named) or "caption_channels" not in config:
        kind = brief(sorted(named)[0]) if named else "another network"
        raise WeightsError(f"{key}: {path} holds {kind}, no {TRANSFORMER}")


def text_length_of(tensors: Mapping[str, Tensor]) -> int | None:
    """L: rows of the network's own empty text; None where weights have none."""
    return len(tensors[LIBRARY_EMPTY]) if LIBRARY_EMPTY in tensors and tensors[LIBRARY_EMPTY].dim() else None


def _numbers_of(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, key: str) -> dict[str, Any]:
    """The constructor numbers that weights with published names have, from their shapes."""
    needed = {"patch": "pos_embed.proj.weight", "text": "caption_projection.linear_1.weight", "out": "proj_out.weight"}
    shape = {name: tuple(tensors[one].shape) if one in tensors else () for name, one in needed.items()}
    if wrong := [one for one, size in shape.items() if len(size) != (4 if one == "patch" else 2) or 0 in size]:
        raise WeightsError(
            f"{key}: {path} holds no PixArt-alpha: {needed[wrong[0]]} is of the shape {shape[wrong[0]]}"
        )
    width, channels, patch, _ = shape["patch"]
    if width not in HEADS:
        raise WeightsError(
            f"{key}: {path} holds no PixArt-alpha of a published width, but one of {width}; published are "
            f"{sorted(HEADS)}"
        )
    if EMPTY in state and state[EMPTY].dim() != 2:
        raise WeightsError(f"{key}: {path}: {EMPTY} is of the shape {tuple(state[EMPTY].shape)}, not (L, D)")
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    places = next((state[name].shape[1] for name in POSITIONS[:1] if name in state and state[name].dim() == 3), 0)
    sees_sizes = "csize_embedder.mlp.0.weight" in state
    side = math.isqrt(places) * patch if places else 128 if sees_sizes else 32
    return numbers(
        HEADS[width], width // HEADS[width], max(blocks, default=-1) + 1, shape["text"][1], in_channels=channels,
        out_channels=shape["out"][0] // patch**2, patch_size=patch, sample_size=side,
        interpolation_scale=max(side // 64, 1), use_additional_conditions=sees_sizes,
    )  # fmt: skip
