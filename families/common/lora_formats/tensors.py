"""The tensors of a LoRA file or an embedding, read without unpickling anything."""

from pathlib import Path

import torch
from torch import Tensor

from families.common.lora_formats.adapters import LoraFileError
from modules.pickled_weights import read_pickled
from modules.safetensors_files import open_weights
from warpcore.files import why_no_file

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or of a PyTorch file read without running code in it.

    Those of eight bits are given in bfloat16, which holds the same numbers, as nothing computes in eight.

    Raises:
        LoraFileError: it is missing or unreadable.
    """
    if problem := why_no_file(path):
        raise LoraFileError(f"there is no LoRA file {path}: it {problem}")
    try:
        if path.suffix != ".safetensors":
            tensors, about = read_pickled(path), {}
        else:
            with open_weights(path) as file:
                tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # whatever unpickling may raise
        raise LoraFileError(f"{path} cannot be read as a LoRA: {error}") from error
    small = {name: one for name, one in tensors.items() if isinstance(one, Tensor) and one.dtype in _EIGHT_BITS}
    return tensors | {name: tensor.to(torch.bfloat16) for name, tensor in small.items()}, about
