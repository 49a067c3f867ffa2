"""LoRA on the denoiser of PixArt-alpha, and its files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from families.common.lora import listed_loras, merge_loras
from families.common.lora_files import read_loras
from families.common.lora_formats import Lora
from families.common.weights import only_shapes
from families.dit import pixart_build
from families.dit.pixart_config import PixartSettings

TRANSFORMER = "transformer"
"""The network of a pipeline, as LoRA files call it."""
Loras = Sequence[tuple[Lora, float]]
"""What each LoRA changes of the denoiser, and its strength."""


def read_lora(path: Path, network: torch.nn.Module) -> Lora:
    """What a LoRA, in any format, changes of the denoiser.

    Raises:
        LoraFileError: it is for another network, damaged, or something else.
    """
    return read_loras(path, {TRANSFORMER: network}, "model_version").get(TRANSFORMER, Lora({}))


def open_loras(files: Sequence[str], settings: PixartSettings, use_ema: bool = True) -> Loras:
    """Read LoRAs, written as FILE[:STRENGTH], for the denoiser that the settings name.

    A FILE may be the folder of a training run; use_ema takes its averaged weights, where there are some.

    Raises:
        LoraFileError: a file is missing or made for another network.
    """
    if not files:
        return []
    with only_shapes():
        network = pixart_build.denoiser(settings)
    return [(read_lora(path, network), strength) for path, strength in listed_loras(files, use_ema)]


def denoiser(settings: PixartSettings, loras: Loras, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The denoiser with the changes of LoRAs in its weights."""
    network = pixart_build.denoiser(settings, dtype)
    merge_loras(network, loras)
    return network
