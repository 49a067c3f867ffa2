"""What families of one denoiser export: its weights with LoRAs in them, and LoRAs of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from families.common.exports import write_new_files
from families.common.library_files import Component
from families.common.lora import merge_loras
from families.common.lora_files import lora_files, notes_of_ranks
from families.common.transformer_lora import TRANSFORMER, Build, open_loras, read_lora
from families.common.weight_files import FAMILY_KEY, GENERATOR, is_run, weights_in
from families.common.weights import check_names
from warpcore.config import Settings, load_config
from warpcore.errors import UserError
from warpcore.meta import only_shapes
from warpcore.weights import check_range

S = TypeVar("S", bound=Settings)
"""Keys of an export: `run`, `use_ema`, `generator_checkpoint_path` and `lora`."""


def opened(
    kind: type[S], build: Build, find: Callable[[S], Component | None], source: Path, arguments: list[str]
) -> tuple[S, nn.Module, dict[str, Tensor]]:
    """The settings of an export of a run, a file or a folder, the denoiser, and its weights, which fit the precision
    that is asked for (`export_dtype`).

    Without LoRAs the denoiser has shapes alone: the weights are those of their files, which are mapped into memory.

    Args:
        build: see `Build`.
        find: where the weights of the denoiser are that the settings name.
    """
    settings = load_config(kind, [f"--{'run' if is_run(source) else GENERATOR}", str(source), *arguments])
    if settings.generator_checkpoint_path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the denoiser to write; give them, or a run's folder")
    dtype = getattr(torch, settings.export_dtype)
    if settings.lora:
        loras, network = open_loras(build, settings.lora, settings, settings.use_ema), build(settings, torch.float32)
        merge_loras(network, loras)
        for note in notes_of_ranks([lora for lora, _ in loras], "merged"):
            print(f"{note}.")
        check_range(network.state_dict(), dtype)
        return settings, network, network.state_dict()
    with only_shapes():
        network = build(settings)
    found = find(settings)
    tensors = dict(found.tensors())
    check_names(network.state_dict(), tensors, found.path, GENERATOR)
    check_range(tensors, dtype)
    return settings, network, tensors


def export_lora(
    settings_kind: type[Settings], build: Build, family: str, kind: str, source: Path, target: Path,
    arguments: list[str],
) -> None:  # fmt: skip
    """Write the LoRA of a run, a file or peft's folder in one of the formats `families.common.lora_files` has."""
    weights_in(source, "lora")  # says what is wrong with a run that has none
    settings: Any = load_config(settings_kind, [f"--{'run' if is_run(source) else 'lora'}", str(source), *arguments])
    if len(settings.lora) != 1:
        raise UserError(f"one LoRA at a time, not {len(settings.lora)}: {', '.join(settings.lora) or source}")
    with only_shapes():
        network = build(settings)
    lora = read_lora(weights_in(source, "lora", settings.use_ema), network)
    about = {FAMILY_KEY: family} | {key: str(getattr(settings, key)) for key in settings.about_network}
    files = lora_files({TRANSFORMER: lora}, target, kind, {TRANSFORMER: network}, about)
    write_new_files(files, notes_of_ranks([lora], kind))
