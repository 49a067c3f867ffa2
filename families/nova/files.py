"""NOVA's transformer in its published form: a folder, or a pipeline's, with `config.json` and the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.library_files import CONFIG, component_folder, construct, fill, read_config, read_tensors
from families.common.weights import WeightsError, read_weights
from modules.nova import NOVATransformer

PART = "transformer"
"""The folder of the network in a pipeline's."""
PICKLED = "diffusion_pytorch_model.bin"
"""As which the published training saves the weights; read without running any code in it."""
MIXER = "video_encoder.mixer."
MIXER_RANK = {"lora": f"{MIXER}lora.weight", "full": f"{MIXER}proj.weight"}


def read_transformer(path: Path, key: str, dtype: torch.dtype = torch.float32) -> NOVATransformer:
    """The network of a folder, built as its config says.

    Args:
        path: the network's folder, or that of a pipeline. key: the config key that named it, which an error names.

    Raises:
        UserError: something is missing or damaged, or config and weights are of two networks.
    """
    folder = component_folder(path, PART)
    config = read_config(folder, key)
    if config is None:
        raise WeightsError(f"{key}: {folder} lacks {CONFIG}, which says how the network is built")
    with torch.device("meta"):
        network = construct(NOVATransformer, config, key)
    tensors = folder_tensors(folder, key)
    _check_mixer(config, tensors, folder, key)
    fill(network, tensors, folder, key, dtype)
    return network


def folder_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a folder: of its safetensors files, else of its `diffusion_pytorch_model.bin`."""
    pickled = folder / PICKLED
    if pickled.is_file() and not any(folder.glob("*.safetensors*")):
        return read_weights(pickled, key)
    return read_tensors(folder, key)


def _check_mixer(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, key: str) -> None:
    """Raise UserError where weights have a mixer of frames that the config does not speak of, or the other way: in
    published training configurations the key is missing."""
    said = config.get("video_mixer_rank") or None
    if MIXER_RANK["full"] not in tensors:
        found = None
    elif MIXER_RANK["lora"] in tensors:
        found = len(tensors[MIXER_RANK["lora"]])
    else:
        found = -1
    if found != (said if said is None or said > 0 else -1):
        raise WeightsError(
            f"{key}: the weights of {folder} have {_named(found)}, but its {CONFIG} says {_named(said)}: write "
            f'"video_mixer_rank": {found or 0} into it'
        )


def _named(rank: int | None) -> str:
    if rank is None:
        return "no mixer of frames"
    return f"a mixer of rank {rank}" if rank > 0 else "a mixer of full rank"
