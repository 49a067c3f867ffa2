"""What Open-Sora exports: the formats of `tools/export.py`."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from families.common import transformer_exports
from families.common.exports import OTHER_NAME, print_sizes, write_new_files
from families.common.library_files import Component
from families.common.transformer_exports import opened
from families.common.weight_files import GENERATOR
from families.open_sora import build
from families.open_sora.files import read_network
from families.open_sora.inference import OpenSoraInferenceSettings
from warpcore.keys import Place
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import converted

FAMILY = "open_sora"
OF_DRAWING = frozenset({"use_timestep_transform", "autoencoder_frames"})


class ExportSettings(OpenSoraInferenceSettings):
    """Keys of `published`, beside those of the networks."""

    unused = OF_DRAWING

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights; float32 is what published files have."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


class LoraExportSettings(OpenSoraInferenceSettings):
    """Keys of `lora`, beside those of the networks."""

    unused = OF_DRAWING

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    """A file of the published names: `model.safetensors` of a published folder, or a `.pth`."""
    settings, _, tensors = opened(ExportSettings, build.network, _component, source, arguments)
    dtype = getattr(torch, settings.export_dtype)
    if target.suffix == ".safetensors":
        write_new_files({target: (converted(tensors, dtype), {})})
        return
    check_new([target], OTHER_NAME)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_pytorch_file(target, tensors, dtype)
    print_sizes([target])


def _component(settings: OpenSoraInferenceSettings) -> Component:
    path = settings.generator_checkpoint_path
    return Component(path, lambda: read_network(path, GENERATOR, settings.model_version))


export_lora = partial(transformer_exports.export_lora, LoraExportSettings, build.network, FAMILY)
