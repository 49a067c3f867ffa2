"""What Cosmos-Predict2 exports: the formats of `tools/export.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from families.common.exports import OTHER_NAME, print_sizes, write_new_files
from families.common.library_files import CONFIG_KEY, constructor_numbers, save_library_folder
from families.common.lora_files import lora_files
from families.common.weight_files import FAMILY_KEY, GENERATOR, TARGET_KEY, is_run, weights_in
from families.common.weights import check_names, only_shapes
from families.cosmos import build
from families.cosmos.config import TARGET
from families.cosmos.inference import CosmosInferenceSettings
from families.cosmos.lora import TRANSFORMER, open_loras, read_lora, transformer
from families.cosmos.original_names import PREFIX, buffers, published_tensors
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.keys import Place
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import check_range, converted, write_weights

FAMILY = "cosmos"


class ExportSettings(CosmosInferenceSettings):
    """Keys of `published` and `diffusers`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the written weights; bfloat16 is what published files have."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    check_new([target], OTHER_NAME)
    settings, network, tensors = opened(source, arguments)
    head_size, dtype = network.config.attention_head_dim, getattr(torch, settings.export_dtype)
    if target.suffix == ".safetensors":
        tensors = converted(tensors, dtype)
    tensors = {PREFIX + name: tensor for name, tensor in published_tensors(tensors, head_size).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        config = json.dumps(constructor_numbers(dict(network.config)))
        write_weights(target, tensors, about(settings) | {CONFIG_KEY: config})
    else:
        write_pytorch_file(target, tensors, dtype, unchanged={PREFIX + name for name in buffers(head_size)})
    print_sizes([target])


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    settings, network, tensors = opened(source, arguments)
    network.load_state_dict(converted(tensors, getattr(torch, settings.export_dtype)), assign=True)
    save_library_folder(network, target)
    print_sizes(sorted(target.rglob("*.safetensors")))


def opened(source: Path, arguments: list[str]) -> tuple[ExportSettings, nn.Module, dict[str, Tensor]]:
    """The settings of an export of a run, a file or a folder, the denoiser, and its weights, which fit the precision
    that is asked for.

    Without LoRAs the denoiser has shapes alone: the weights are those of their files, which are mapped into memory.
    """
    key = "run" if is_run(source) else GENERATOR
    settings = load_config(ExportSettings, [f"--{key}", str(source), *arguments])
    if settings.generator_checkpoint_path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the denoiser to write; give them, or a run's folder")
    dtype = getattr(torch, settings.export_dtype)
    if settings.lora:
        network = transformer(settings, open_loras(settings.lora, settings, settings.use_ema))
        check_range(network.state_dict(), dtype)
        return settings, network, network.state_dict()
    with only_shapes():
        network = build.transformer(settings)
    found = build.generator_source(settings)
    tensors = found.tensors()
    check_names(network.state_dict(), tensors, found.path, GENERATOR)
    check_range(tensors, dtype)
    return settings, network, tensors


def about(settings: CosmosInferenceSettings) -> Mapping[str, str]:
    """What a file of weights says of itself."""
    return {"format": "pt", FAMILY_KEY: FAMILY, "model_version": settings.model_version, TARGET_KEY: TARGET}


# ---------------------------------------------------------------- LoRA


class LoraExportSettings(CosmosInferenceSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


def export_lora(kind: str, source: Path, target: Path, arguments: list[str]) -> None:
    key = "run" if is_run(source) else "lora"
    settings = load_config(LoraExportSettings, [f"--{key}", str(source), *arguments])
    if len(settings.lora) != 1:
        raise UserError(f"one LoRA at a time, not {len(settings.lora)}: {', '.join(settings.lora) or source}")
    with only_shapes():
        network = build.transformer(settings)
    lora = read_lora(weights_in(source, "lora", settings.use_ema), network)
    said = {name: value for name, value in about(settings).items() if name in (FAMILY_KEY, "model_version")}
    write_new_files(lora_files({TRANSFORMER: lora}, target, kind, {TRANSFORMER: network}, said))
