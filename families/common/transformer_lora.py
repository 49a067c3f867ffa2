"""LoRA on the one denoiser of a family, which pipelines call `transformer`: its files, and what trains it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families.common.library_files import CONFIG_KEY
from families.common.lora import add_adapters, draw_with, listed_loras
from families.common.lora_files import metadata, read_loras
from families.common.lora_formats import Lora
from families.common.lora_training import DrawnWithoutLora, freeze, lora_of, lora_tensors, start_from
from families.common.prompt_samples import PromptSamples
from families.common.weight_files import GENERATOR
from modules.lora import without_adapters
from modules.rank_by_noise import follow_noise
from warpcore.meta import only_shapes

TRANSFORMER = "transformer"
"""The network of a pipeline, as LoRA files call it."""
Build = Callable[..., nn.Module]
"""Builds a family's denoiser from its settings and, where weights are wanted, a dtype."""
Loras = Sequence[tuple[Lora, float]]
"""What each LoRA changes of the denoiser, and its strength."""


def read_lora(path: Path, network: nn.Module) -> Lora:
    """What a LoRA, in any format, changes of the denoiser.

    Raises:
        LoraFileError: it is for another network, damaged, or something else.
    """
    return read_loras(path, {TRANSFORMER: network}, GENERATOR).get(TRANSFORMER, Lora({}))


def open_loras(build: Build, files: Sequence[str], settings: Any, use_ema: bool = True) -> Loras:
    """Read LoRAs, written as FILE[:STRENGTH], for the denoiser that the settings name.

    A FILE may be the folder of a training run; use_ema takes its averaged weights, where there are some.

    Raises:
        LoraFileError: a file is missing or made for another network.
    """
    if not files:
        return []
    with only_shapes():
        network = build(settings)
    return [(read_lora(path, network), strength) for path, strength in listed_loras(files, use_ema)]


def built_with(build: Build, loras: Loras, settings: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser, which draws with the changes of LoRAs."""
    network = build(settings, dtype)
    draw_with(network, loras)
    return network


class TransformerLora(DrawnWithoutLora, PromptSamples):
    """Hooks of a script that trains a LoRA; named before the class that trains the whole denoiser."""

    start_files = ("generator_checkpoint_path", "lora_checkpoint_path")

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        network = networks["generator"]
        freeze(network, config, self.dtype, self.processes)
        add_adapters(network, config.module_filters, config.lora_settings)
        follow_noise(network, self.diffusion.noise_cond.level)
        if config.lora_checkpoint_path:
            start_from(read_lora(config.lora_checkpoint_path, network), network, None, config.lora_checkpoint_path)
        return networks

    def without_lora(self) -> AbstractContextManager:
        return without_adapters(self.networks["generator"])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        own = lora_tensors(self.networks["generator"], None)
        return {"lora": {f"{TRANSFORMER}.{name}": tensor for name, tensor in own.items()}}

    def file_metadata(self) -> dict[str, str]:
        about = metadata({TRANSFORMER: lora_of(self.networks["generator"])})
        return {key: value for key, value in super().file_metadata().items() if key != CONFIG_KEY} | about
