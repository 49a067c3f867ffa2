"""What PixArt-alpha exports: the formats of `tools/export.py`."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from families.common import transformer_exports
from families.common.exports import OTHER_NAME, print_sizes
from families.common.library_files import save_library_folder
from families.common.transformer_exports import opened
from families.common.weight_files import GENERATOR
from families.dit import pixart_build
from families.dit.pixart_inference import PixartInferenceSettings
from families.dit.pixart_names import LIBRARY_EMPTY, POSITIONS, published_tensors
from warpcore.errors import UserError
from warpcore.keys import Place
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import converted

FAMILY = "pixart"


class ExportSettings(PixartInferenceSettings):
    """Keys of `published` and `diffusers`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights; float32 is what published files have."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    check_new([target], OTHER_NAME)
    settings, network, tensors = opened(
        ExportSettings, pixart_build.denoiser, pixart_build.denoiser_source, source, arguments
    )
    if LIBRARY_EMPTY not in tensors:
        raise UserError(
            f"{GENERATOR}: {settings.generator_checkpoint_path} has no empty text of its own (y_embedding), which a "
            "published file holds: write it with `diffusers`"
        )
    side = network.pos_embed.base
    state = {POSITIONS[0]: network.pos_embed.positions([side, side])} | published_tensors(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, settings.export_dtype)
    write_pytorch_file(target, state, dtype, unchanged=POSITIONS, under="state_dict")
    print_sizes([target])


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    settings, network, tensors = opened(
        ExportSettings, pixart_build.denoiser, pixart_build.denoiser_source, source, arguments
    )
    network.load_state_dict(converted(tensors, getattr(torch, settings.export_dtype)), assign=True)
    network.y_embedding = None  # which the library's class does not have
    save_library_folder(network, target)
    print_sizes(sorted(target.rglob("*.safetensors")))


# ---------------------------------------------------------------- LoRA


class LoraExportSettings(PixartInferenceSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


export_lora = partial(transformer_exports.export_lora, LoraExportSettings, pixart_build.denoiser, FAMILY)
