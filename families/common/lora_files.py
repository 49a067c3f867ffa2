"""LoRA files on disk, for any network: their tensors and metadata, read without unpickling anything."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from families.common.lora_formats import peft
from families.common.lora_formats.adapters import Adapter, LoraFileError
from modules.lora import Place


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or of a PyTorch file read without running code in it.

    Raises:
        LoraFileError: it is missing or unreadable.
    """
    if not path.is_file():
        raise LoraFileError(f"there is no LoRA file {path}")
    try:
        if path.suffix != ".safetensors":
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict):
                raise ValueError("it holds no tensors by name")
            return tensors, {}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # whatever unpickling may raise
        raise LoraFileError(f"{path} cannot be read as a LoRA: {error}") from error


def peft_config(path: Path) -> dict:
    """The config of a folder of peft's; nothing for a file."""
    if not path.is_dir():
        return {}
    try:
        return json.loads((path / peft.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraFileError(f"{peft.CONFIG} cannot be read: {error}") from None


def check_adapters(adapters: Mapping[str, Adapter], there: Mapping[str, Place], hint: str) -> None:
    """Raise LoraFileError where adapters do not fit the places of a network, or are not finite.

    hint: which keys to check where shapes differ.
    """
    for name, adapter in adapters.items():
        if name not in there:
            raise LoraFileError(f"it was made for another network: this one has no layer {name}")
        shape = tuple(there[name].weight.shape)
        made_for = (adapter.up.shape[0], *adapter.down.shape[1:])
        if made_for != shape or adapter.down.shape[0] != adapter.rank:
            raise LoraFileError(
                f"it was made for another network: {name} is {made_for} in the file (rank {adapter.rank}) and {shape} "
                f"here. Check {hint}"
            )
        parts = (adapter.up, adapter.down, adapter.magnitude)
        if not all(part.isfinite().all() for part in parts if part is not None):
            raise LoraFileError(f"{name} holds numbers that are not finite: its training went wrong, or it is damaged")
        lengths = (1, shape[1]) if adapter.by_columns else (shape[0],)
        if adapter.magnitude is not None and tuple(adapter.magnitude.shape) != lengths:
            raise LoraFileError(f"{name} has {adapter.magnitude.numel()} lengths of DoRA for a weight of {shape}")
