"""The denoiser, the autoencoder and the text encoder wherever a config may say that they are.

a pipeline of diffusers    runs/exported               its folders transformer, vae, text_encoder, tokenizer
one network's folder       runs/exported/transformer   config.json and safetensors
a published file           model.pt                    names of the published program, after `net.` or `net_ema.`
a published folder         Cosmos-Predict2-2B/         model.pt, tokenizer/tokenizer.pth (which is the autoencoder)
a published training run   checkpoints/                model/iter_NUMBER.pt, latest_checkpoint.txt says which
one network's file         generator.safetensors       diffusers' names, as runs export them
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from families.common import library_files
from families.common.library_files import CONFIG, component_folder, read_config, read_tensors
from families.common.wan_autoencoder import read_wan_tensors
from families.common.weight_files import read_header
from families.common.weights import WeightsError, existing_file, read_weights
from families.cosmos.original_names import AVERAGE, PREFIX, is_published, library_tensors
from families.cosmos.published_folder import LATEST, PUBLISHED_FILE, published_file
from families.cosmos.versions import COMMON, VERSIONS, version_of
from warpcore.errors import UserError
from warpcore.exports import is_index
from warpcore.text import brief, shortened

TRANSFORMER = "CosmosTransformer3DModel"
PUBLISHED_AUTOENCODER = Path("tokenizer", "tokenizer.pth")
PATCH_SIDES = {COMMON["out_channels"] * side**2: side for side in (1, 2)}
"""Latent positions per token and side, by the numbers that the last layer gives for a token."""
_LORA = re.compile(r"\.lora_[AB]\.")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component(library_files.Component):
    """A network in a file or folder, with what stands beside it."""

    tokenizer: Path | None = None
    """The folder of a text encoder's tokenizer, where there is one beside it."""


# ---------------------------------------------------------------- the denoiser


def find_transformer(path: Path, key: str, average: bool = False) -> Component:
    """The denoiser of a file or folder; see this module.

    Args:
        key: the config key that named the path, which an error names.
        average: take `net_ema.` of a published file that has both.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    if path.is_dir():
        if (file := published_file(path)) is not None:
            if not file.is_file():
                raise WeightsError(f"{key}: {path / LATEST} names {file.name}, but there is no {file}")
            return _of_published_file(file, key, average)
        folder = component_folder(path, "transformer")
        config = read_config(folder, key)
        if config is None:
            raise UserError(
                f"{key}: {path} is no folder with a Cosmos-Predict2: it holds none of transformer/{CONFIG}, {CONFIG}, "
                f"{PUBLISHED_FILE} and {LATEST}"
            )
        _check_config(config, folder, key)
        return Component(folder, partial(read_tensors, folder, key), config)
    existing_file(path, key)
    if path.suffix != ".safetensors" and not is_index(path):
        return _of_published_file(path, key, average)
    config = read_config(path, key)
    if config is None or any(map(is_published, read_header(path).names)):
        return _of_published_file(path, key, average, config)
    _check_config(config, path, key)
    return Component(path, partial(read_tensors, path, key), config)


def _of_published_file(path: Path, key: str, average: bool, config: Mapping[str, Any] | None = None) -> Component:
    """A file with published names, with a prefix or without, or with diffusers'; config: what it says."""
    state = _without_prefix(read_weights(path, key), path, average)
    adapted = [name for name in state if _LORA.search(name)]
    if adapted:
        logger.warning(
            "%s: %s holds a LoRA beside the weights that it changes: only those are read. Name the file in `lora` too",
            key, path,
        )  # fmt: skip
    state = {name.replace(".base_layer.", "."): t for name, t in state.items() if not _LORA.search(name)}
    found = library_tensors(state) if any(map(is_published, state)) else state
    return Component(path, lambda: found, config or _numbers_of(found, path, key))


def _without_prefix(state: Mapping[str, Tensor], path: Path, average: bool) -> dict[str, Tensor]:
    kinds = {prefix: any(name.startswith(prefix) for name in state) for prefix in (PREFIX, AVERAGE)}
    if not any(kinds.values()):
        return dict(state)
    prefix = AVERAGE if kinds[AVERAGE] and (average or not kinds[PREFIX]) else PREFIX
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _numbers_of(tensors: Mapping[str, Tensor], path: Path, key: str) -> dict[str, Any]:
    """The constructor numbers that weights with the published number of predicted channels have.

    Raises:
        UserError: they are those of another network.
    """
    needed = {
        "patch": "patch_embed.proj.weight", "norm": "transformer_blocks.0.attn1.norm_q.weight",
        "text": "transformer_blocks.0.attn2.to_k.weight", "rank": "transformer_blocks.0.norm1.linear_1.weight",
        "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
    }  # fmt: skip
    if missing := [name for name in needed.values() if name not in tensors]:
        raise WeightsError(
            f"{key}: {path} holds no denoiser of Cosmos-Predict2: {missing[0]} is missing, and it has "
            f"{', '.join(sorted(tensors)[:3]) or 'nothing'}"
        )
    shape = {name: tuple(tensors[tensor].shape) for name, tensor in needed.items()}
    if wrong := [one for one, size in shape.items() if len(size) != (1 if one == "norm" else 2) or 0 in size]:
        raise WeightsError(
            f"{key}: {path} holds no denoiser of Cosmos-Predict2: {needed[wrong[0]]} is of the shape {shape[wrong[0]]}"
        )
    width, columns = shape["patch"]
    last = tensors.get("proj_out.weight")
    side = PATCH_SIDES.get(len(last) if last is not None and last.dim() else None, COMMON["patch_size"][-1])
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"transformer_blocks\.(\d{1,9})\.", name))}
    seen = {
        "in_channels": columns // side**2 - 1, "patch_size": [1, side, side],
        "num_attention_heads": width // shape["norm"][0], "attention_head_dim": shape["norm"][0],
        "num_layers": max(blocks) + 1, "text_embed_dim": shape["text"][1],
        "adaln_lora_dim": shape["rank"][0], "mlp_ratio": shape["mlp"][0] / width,
    }  # fmt: skip
    version = version_of(seen)  # which says what tensors do not: how positions turn
    config = (COMMON if version is None else dict(VERSIONS[version].transformer)) | seen
    _check_config(config, path, key)
    return config


def _check_config(config: Mapping[str, Any], path: Path, key: str) -> None:
    """Raise UserError for a config of another network, or of one that sees more than noised latents."""
    if (kind := config.get("_class_name", TRANSFORMER)) != TRANSFORMER:
        raise UserError(f"{key}: {path} holds {shortened(str(kind))}, not {TRANSFORMER}")
    if "_class_name" not in config and "attention_head_dim" not in config:  # a file's own config names no class
        told = ", ".join(shortened(str(name)) for name in list(config)[:3]) or "nothing"
        raise UserError(
            f"{key}: {path} holds no denoiser of Cosmos-Predict2: its config has no attention_head_dim, but {told}"
        )
    for name in ("patch_size", "max_size"):
        if name in config and not _are_sizes(config[name]):
            raise UserError(f"{key}: {name} of {path} is {brief(config[name])}, which is no three numbers")
    seen, made = config.get("in_channels", 16), config.get("out_channels", 16)
    if seen != made:
        seen, made = brief(seen), brief(made)
        raise UserError(
            f"{key}: the network in {path} sees {seen} channels and predicts {made}, as Video2World models do; only "
            "Text2Image models are supported"
        )
    unlike = {name: config[name] for name in ("use_crossattn_projection", "img_context_dim_in") if config.get(name)}
    if config.get("extra_pos_embed_type", "learnable") is not None:
        unlike["extra_pos_embed_type"] = config.get("extra_pos_embed_type", "learnable")
    if unlike:
        told = ", ".join(f"{name}: {shortened(str(value))}" for name, value in unlike.items())
        raise UserError(f"{key}: {path} is of another Cosmos than Predict2 ({told})")


def _are_sizes(value: Any) -> bool:
    """Whether it is three whole numbers above 0: frames, height, width."""
    is_list = isinstance(value, list | tuple) and len(value) == 3
    return is_list and all(type(one) is int and one > 0 for one in value)


def check_version(found: Component, model_version: str, key: str) -> None:
    """Raise WeightsError where a denoiser is not of the size that the config says."""
    version = version_of(found.config)
    if version is not None and version != model_version:
        raise WeightsError(
            f"{key}: {found.path} is of size {version}; write model_version: {version}, or name other weights"
        )
    expected = VERSIONS[model_version].transformer
    if version is None and model_version != "mini":
        names = ("num_attention_heads", "attention_head_dim", "num_layers")
        here, there = ("x".join(brief(config.get(name)) for name in names) for config in (found.config, expected))
        raise WeightsError(
            f"{key}: {found.path} is of no published size (heads x head size x blocks: {here}; {model_version} has "
            f"{there})"
        )


# ---------------------------------------------------------------- what stands beside it


def find_beside(path: Path, name: str, key: str) -> Component | None:
    """The `vae` or the `text_encoder` that stands beside a denoiser; None where there is none."""
    if not path.exists():
        return None
    root = path if path.is_dir() else path.parent
    if name == "vae" and (file := root / PUBLISHED_AUTOENCODER).is_file():
        return find_autoencoder(file, key)
    if root.name == "transformer":
        root = root.parent
    if not (root / name / CONFIG).is_file():
        return None
    return find_autoencoder(root / name, key) if name == "vae" else find_text_encoder(root / name, key)


def find_autoencoder(path: Path, key: str) -> Component:
    """The autoencoder of a pipeline, a folder, or a file (safetensors, or the published `tokenizer.pth`).

    Raises:
        UserError: it is missing, or damaged.
    """
    path = component_folder(path, "vae")
    if path.is_dir() and not (path / CONFIG).is_file() and (path / PUBLISHED_AUTOENCODER).is_file():
        path = path / PUBLISHED_AUTOENCODER
    config = read_config(path, key) if path.is_dir() or path.suffix == ".safetensors" else None
    if path.is_file() and path.name.endswith("tokenizer_fast.pth"):
        raise UserError(f"{key}: {path} is TorchScript, which is code, and is never run")
    return Component(path, partial(read_wan_tensors, path, key), config)


def find_text_encoder(path: Path, key: str) -> Component:
    """The text encoder of a pipeline, or the folder or file of a T5.

    Raises:
        UserError: it is missing, or damaged.
    """
    path = component_folder(path, "text_encoder")
    config = read_config(path, key)
    beside = path.with_name("tokenizer")
    return Component(path, partial(read_tensors, path, key), config, beside if beside.is_dir() else None)
