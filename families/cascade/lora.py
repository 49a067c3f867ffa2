"""LoRA and trained tokens on the networks of the cascade: for training, and from files for drawing."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from families.cascade.config import ModelSettings
from families.cascade.inference import warn_of_contradictions
from families.cascade.lora_files import read_lora
from families.common.lora import add_adapters, listed_loras
from families.common.lora_formats import Lora, LoraFileError
from families.common.lora_training import differences, start_from, warn_of_missing_tokens
from modules.lora import EVERY_LAYER, LoraSettings, adapters, places
from modules.stage_c import StageC
from modules.tokens import TokenRows

NAMES_WITH_A_DOT = r"\."
"""The filter for all layers but those beside the network's blocks: what the filter '.' found in older versions."""


def adapt(
    network: nn.Module, filters: Sequence[str], settings: LoraSettings, checkpoint: Collection[str] | None = None
) -> None:
    """Put adapters at the places of a network that `module_filters` find.

    checkpoint: names of the tensors that a run goes on with. A run that began when the filter '.' did not find the
    layers whose names have no dot keeps its layers.
    """
    if checkpoint is not None and EVERY_LAYER in filters and not _adapts_names_without_a_dot(network, checkpoint):
        filters = [NAMES_WITH_A_DOT if text == EVERY_LAYER else text for text in filters]
    add_adapters(network, filters, settings)


def _adapts_names_without_a_dot(network: nn.Module, checkpoint: Collection[str]) -> bool:
    names = tuple(f".{name}.lora." for name in places(network) if "." not in name)
    return any(part in stored for stored in checkpoint for part in names)


def load_into(network: nn.Module, rows: TokenRows | None, path: Path, filters: Sequence[str]) -> None:
    """Start the adapters and tokens of a training from those of a file, which have to be the same ones.

    The adapters change the network as those of the file do, whatever the alphas of the two are.

    Raises:
        LoraFileError: they are others, or of another rank.
    """
    lora = read_lora(path, network, filters, rows)
    there = {name: adapter for name, _, adapter in adapters(network)}
    differing = differences(lora, there, [token.name for token in rows.tokens] if rows else [])
    try:
        start_from(lora, network, rows, path)
    except LoraFileError as error:
        raise LoraFileError(f"{error}{_hint(differing, there)}") from None


def _hint(differing: Sequence[str], there: Collection[str]) -> str:
    """What to write where a file is from before the filter '.' found the layers whose names have no dot, too."""
    if not differing or any("." in name or name not in there for name in differing):
        return ""
    return f". Write module_filters: ['{NAMES_WITH_A_DOT}'] to leave out {', '.join(differing)}"


def open_loras(files: Sequence[str], settings: ModelSettings, use_ema: bool = True) -> list[tuple[Lora, float]]:
    """Read LoRAs, written as FILE[:STRENGTH], for the Stage C that the settings name.

    A FILE may be the folder of a training run; use_ema takes its averaged weights, where there are some.

    Raises:
        LoraFileError: a file is missing or made for another network.
    """
    if not files:
        return []
    network = outline(settings)
    found = listed_loras(files, use_ema)
    for path, _ in found:
        warn_of_contradictions(path, settings)
    opened = [(read_lora(path, network), strength) for path, strength in found]
    warn_of_missing_tokens(files, [[lora] for lora, _ in opened])
    return opened


def outline(settings: ModelSettings) -> StageC:
    """Stage C without weights, which says what its layers are called and how large they are."""
    with torch.device("meta"):
        return StageC(**settings.version.stage_c)
