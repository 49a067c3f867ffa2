"""What NOVA exports: the format of `tools/export.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from families.common.exports import write_new_files
from families.common.library_files import CONFIG
from families.common.weight_files import GENERATOR, is_run
from families.common.weights import check_names
from families.nova import build
from families.nova.config import NovaSettings
from families.nova.files import CLASS, PART, WEIGHTS, check_mixer, config_said, read_nova
from families.nova.inference import NovaInferenceSettings
from families.nova.schedulers import SCHEDULER, scheduler_config
from families.nova.versions import PUBLISHED_CLASSES
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.meta import only_shapes
from warpcore.weights import check_range, converted


class ExportSettings(NovaInferenceSettings):
    """Keys of `published`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights."""


def to_published(source: Path, target: Path, arguments: list[str]) -> None:
    """What a training makes of a published pipeline's folder: the transformer, and what says its diffusion."""
    settings = load_config(ExportSettings, [f"--{'run' if is_run(source) else GENERATOR}", str(source), *arguments])
    path = settings.generator_checkpoint_path
    if path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the transformer to write; give them, or a run's folder")
    build.check_network(config_said(path, GENERATOR), settings)
    with only_shapes():  # sizes follow from the autoencoder, which is not downloaded for them
        size_px = settings.trained_px
        config, network = published_config(settings, size_px), build.network(settings, size_px)
    tensors = read_nova(path, GENERATOR)
    check_mixer(tensors, settings.video_mixer_rank, path, GENERATOR)
    check_names(network.state_dict(), tensors, path, GENERATOR)
    dtype = getattr(torch, settings.export_dtype)
    check_range(tensors, dtype)
    files = {
        target / PART / CONFIG: _json(config),
        target / PART / WEIGHTS: (converted(tensors, dtype), {}),
        target / SCHEDULER: _json(scheduler_config(settings.target, settings.shift)),
    }
    write_new_files(files, _notes(settings))


def published_config(settings: NovaSettings, size_px: Sequence[int]) -> dict[str, Any]:
    """What `config.json` says of a network for pictures, or frames, of `size_px` (H, W)."""
    numbers = build.network_numbers(settings, size_px)
    usual = {"num_classes": PUBLISHED_CLASSES}  # which published configs do not say
    said = {name: number for name, number in numbers.items() if number is not None and usual.get(name) != number}
    return {"_class_name": CLASS} | said


def _notes(settings: ExportSettings) -> list[str]:
    """What no file of the folder can say."""
    notes = []
    if settings.is_toy:
        notes.append(f"{settings.model_version} is a toy, whose sizes have no name in the published program")
    if settings.num_classes not in (None, PUBLISHED_CLASSES):
        notes.append(f"The published program has {PUBLISHED_CLASSES} classes, and this network {settings.num_classes}")
    if settings.version.draws_clips and settings.told_motion is None:
        notes.append("The run told its network no motion: draw without motion_flow")
    return notes


def _json(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, indent=2) + "\n"
