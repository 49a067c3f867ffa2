"""What PixArt-alpha exports: the formats of `tools/export.py`."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from families.common.exports import OTHER_NAME, print_sizes, write_new_files
from families.common.library_files import save_library_folder
from families.common.lora_files import lora_files
from families.common.weight_files import FAMILY_KEY, GENERATOR, is_run, weights_in
from families.common.weights import check_names, only_shapes
from families.dit import pixart_build
from families.dit.pixart_inference import PixartInferenceSettings
from families.dit.pixart_lora import TRANSFORMER, denoiser, open_loras, read_lora
from families.dit.pixart_names import LIBRARY_EMPTY, POSITIONS, published_tensors
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.keys import Place
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import check_range, converted

FAMILY = "pixart"


class ExportSettings(PixartInferenceSettings):
    """Keys of `published` and `diffusers`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights; float32 is what published files have."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    check_new([target], OTHER_NAME)
    settings, network, tensors = opened(source, arguments)
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
    settings, network, tensors = opened(source, arguments)
    network.load_state_dict(converted(tensors, getattr(torch, settings.export_dtype)), assign=True)
    network.y_embedding = None  # which the library's class does not have
    save_library_folder(network, target)
    print_sizes(sorted(target.rglob("*.safetensors")))


def opened(source: Path, arguments: list[str]) -> tuple[ExportSettings, nn.Module, dict[str, Tensor]]:
    """The settings of an export of a run, a file or a folder, the denoiser, and its weights, which fit the precision
    that is asked for.

    Without LoRAs the denoiser has shapes alone: the weights are those of their files, which are mapped into memory.
    """
    settings = load_config(ExportSettings, [f"--{'run' if is_run(source) else GENERATOR}", str(source), *arguments])
    if settings.generator_checkpoint_path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the denoiser to write; give them, or a run's folder")
    dtype = getattr(torch, settings.export_dtype)
    if settings.lora:
        network = denoiser(settings, open_loras(settings.lora, settings, settings.use_ema))
        check_range(network.state_dict(), dtype)
        return settings, network, network.state_dict()
    with only_shapes():
        network = pixart_build.denoiser(settings)
    found = pixart_build.denoiser_source(settings)
    tensors = found.tensors()
    check_names(network.state_dict(), tensors, found.path, GENERATOR)
    check_range(tensors, dtype)
    return settings, network, dict(tensors)


# ---------------------------------------------------------------- LoRA


class LoraExportSettings(PixartInferenceSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


def export_lora(kind: str, source: Path, target: Path, arguments: list[str]) -> None:
    settings = load_config(LoraExportSettings, [f"--{'run' if is_run(source) else 'lora'}", str(source), *arguments])
    if len(settings.lora) != 1:
        raise UserError(f"one LoRA at a time, not {len(settings.lora)}: {', '.join(settings.lora) or source}")
    with only_shapes():
        network = pixart_build.denoiser(settings)
    lora = read_lora(weights_in(source, "lora", settings.use_ema), network)
    said = {FAMILY_KEY: FAMILY, "model_version": settings.model_version}
    write_new_files(lora_files({TRANSFORMER: lora}, target, kind, {TRANSFORMER: network}, said))
