"""What Cosmos-Predict2 exports: the formats of `tools/export.py`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from families.common import transformer_exports
from families.common.exports import OTHER_NAME, print_sizes
from families.common.library_files import said_config, save_library_folder
from families.common.transformer_exports import opened
from families.common.weight_files import FAMILY_KEY, TARGET_KEY
from families.cosmos import build
from families.cosmos.config import TARGET
from families.cosmos.inference import CosmosInferenceSettings
from families.cosmos.original_names import PREFIX, buffers, published_tensors
from warpcore.keys import Place
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import converted, write_weights

FAMILY = "cosmos"


class ExportSettings(CosmosInferenceSettings):
    """Keys of `published` and `diffusers`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the written weights; bfloat16 is what published files have."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    check_new([target], OTHER_NAME)
    settings, network, tensors = opened(ExportSettings, build.transformer, build.generator_source, source, arguments)
    head_size, dtype = network.config.attention_head_dim, getattr(torch, settings.export_dtype)
    if target.suffix == ".safetensors":
        tensors = converted(tensors, dtype)
    tensors = {PREFIX + name: tensor for name, tensor in published_tensors(tensors, head_size).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        write_weights(target, tensors, about(settings) | said_config(network))
    else:
        write_pytorch_file(target, tensors, dtype, unchanged={PREFIX + name for name in buffers(head_size)})
    print_sizes([target])


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    settings, network, tensors = opened(ExportSettings, build.transformer, build.generator_source, source, arguments)
    network.load_state_dict(converted(tensors, getattr(torch, settings.export_dtype)), assign=True)
    save_library_folder(network, target)
    print_sizes(sorted(target.rglob("*.safetensors")))


def about(settings: CosmosInferenceSettings) -> Mapping[str, str]:
    """What a file of weights says of itself."""
    return {"format": "pt", FAMILY_KEY: FAMILY, "model_version": settings.model_version, TARGET_KEY: TARGET}


# ---------------------------------------------------------------- LoRA


class LoraExportSettings(CosmosInferenceSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


export_lora = partial(transformer_exports.export_lora, LoraExportSettings, build.transformer, FAMILY)
