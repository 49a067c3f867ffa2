"""Networks with the weights of a file, strictly: every name and shape has to be that of the network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from families.common.weight_files import files_of
from modules.pickled_weights import read_pickled_tensors
from modules.safetensors_files import load_weights
from warpcore.errors import UserError
from warpcore.exports import is_index
from warpcore.files import why_no_file
from warpcore.loading import assign
from warpcore.meta import are_only_shapes

Network = TypeVar("Network", bound=nn.Module)

LOOKED_AT = 64
"""Numbers of each tensor of a file that are looked at before it is used."""


class WeightsError(UserError):
    """A weights file is missing, unreadable, or made for another network."""


def with_weights(
    build: Callable[[], Network],
    path: Path | None,
    key: str,
    only: bool = False,
    dtype: torch.dtype = torch.float32,
    deferrable: bool = False,
) -> Network:
    """Build a network; with a file on the meta device first, so that its random weights cost no time and memory.

    Args:
        path: its weights; None leaves them random.
        key: the config key that named the path, which an error names.
        only: the file may hold more than the network's weights.
        deferrable: in a training the weights may wait until the network is where it lives, see `warpcore.loading`.

    Raises:
        WeightsError: the file is missing, unreadable, or made for another network.
    """
    if are_only_shapes():
        with torch.device("meta"):
            return build().to(dtype)
    if path is None:
        return build().to(dtype)
    state = read_weights(path, key)
    with torch.device("meta"):
        network = build()
    if only:
        state = {name: tensor for name, tensor in state.items() if name in network.state_dict()}
    check_names(network.state_dict(), state, path, key)
    assign(network, state, dtype, deferrable)
    return network


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of the several of an index, or of a PyTorch file, which runs no code in it.

    They are mapped into memory, where they take room only as they are used; not those of PyTorch 1.5 and before.

    Raises:
        WeightsError: the file is missing or unreadable.
    """
    existing_file(path, key)
    if is_index(path):
        return {name: tensor for file in files_of(path) for name, tensor in read_weights(file, key).items()}
    try:
        if path.suffix == ".safetensors":
            return load_weights(path)
        return read_pickled_tensors(path, mmap=True)
    except Exception as error:  # whatever a broken archive may raise
        raise WeightsError(f"{key}: {path} cannot be read as weights: {error}") from error


def existing_file(path: Path, key: str) -> Path:
    """The path.

    Raises:
        WeightsError: there is no such file.
    """
    if path.is_dir():
        raise WeightsError(
            f"{key}: {path} is a folder in which no training run has saved: name a file of weights, or another run"
        )
    if problem := why_no_file(path):
        raise WeightsError(
            f"{key}: {path} {problem}. `python3 models/download.py` lists and fetches published weights; "
            "those of mini sizes come with the repository, and those of a run are there once its training has saved"
        )
    return path


def check_names(network: Mapping[str, Tensor], file: Mapping[str, Tensor], path: Path, key: str) -> None:
    """Raise WeightsError where names or shapes of a file's tensors are not those of a network's state, where numbers
    of another kind are in their place, or the first of them are not numbers at all."""
    wrong = [f"{name} is missing in the file" for name in network if name not in file]
    wrong += [f"{name} is only in the file" for name in file if name not in network]
    wrong += [
        f"{name} is {tuple(file[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        for name, tensor in network.items()
        if name in file and file[name].shape != tensor.shape
    ]
    if wrong:
        raise WeightsError(
            f"{key}: {path} was made for another network: {wrong[0]} ({len(wrong)} differences). Check the file, and "
            "the keys that choose the network's size"
        )
    for name, tensor in network.items():
        if tensor.is_floating_point() and not file[name].is_floating_point():
            raise WeightsError(
                f"{key}: {path} holds {file[name].dtype} for {name}: quantised weights are not read, name others"
            )
        if file[name].is_floating_point() and not file[name].is_meta and _begins_with_nan(file[name]):
            raise WeightsError(
                f"{key}: {path}: {name} holds NaN: its training went wrong, or it is damaged; name other weights"
            )


def _begins_with_nan(tensor: Tensor) -> bool:
    """Whether one of the first numbers is NaN. Training that went wrong leaves no other, and all would take long."""
    while tensor.dim() > 1:
        tensor = tensor[0] if len(tensor) else tensor.flatten()
    return bool(tensor.reshape(-1)[:LOOKED_AT].float().isnan().any())
