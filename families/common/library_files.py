"""Networks in the files of diffusers and transformers: a folder with `config.json`, or one safetensors file.

Nothing is run that a file contains, and nothing is downloaded: paths are local.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from families.common.weight_files import files_of
from families.common.weights import check_names, read_weights
from modules.safetensors_files import open_weights
from warpcore.errors import UserError
from warpcore.exports import is_index, read_index
from warpcore.files import why_no_file
from warpcore.loading import assign
from warpcore.safe_json import parse_object, read_object
from warpcore.text import brief, shortened
from warpcore.weights import disk_errors

T = TypeVar("T")
MAX_LAYERS = 1000
"""Of a network; a config that says more would keep a library busy for hours."""
CONFIG, CONFIG_KEY = "config.json", "config"
"""The file of a folder, and the key of a single file's metadata, that say how the network is built."""
FILE_NAMES = ("diffusion_pytorch_model", "model")
PICKLED = Path("pytorch_model.bin")
"""How transformers named weights before safetensors; read without running any code in it."""
VARIANTS = ("", ".fp16", ".bf16")
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
"""What networks predict (`diffusion_target`), as schedulers of diffusers call it (`prediction_type`)."""


@dataclass(frozen=True)
class Component:
    """A network in a file or folder: what is known before its weights are read."""

    path: Path
    """The file, or the network's own folder."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """Reads the weights, in the library's names."""
    config: Mapping[str, Any] | None = None
    """The library's constructor numbers; None where nothing says them."""


def save_library_folder(network: Any, folder: Path) -> None:
    """Write a network or a pipeline of diffusers or transformers as their folder, without progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with disk_errors(folder):
        network.save_pretrained(folder)


def component_folder(path: Path, subfolder: str) -> Path:
    """The folder of a network, in a pipeline's folder or given by itself."""
    return path / subfolder if (path / subfolder / CONFIG).is_file() else path


def read_config(path: Path, key: str) -> dict[str, Any] | None:
    """The constructor numbers that a folder, or a single file's metadata, gives; None where it gives none.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: the path is missing, or the config is no JSON object.
    """
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
    what = f"{key}: the config of {path}"
    if not path.is_file():
        return read_object(path / CONFIG, what) if (path / CONFIG).is_file() else None
    about = read_index(path).about if is_index(path) else _open(path, key).metadata() or {}
    text = about.get(CONFIG_KEY)
    return None if text is None else parse_object(text, what)


def constructor_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers and transformers note beside the numbers (`_class_name`, ...)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def said_config(network: Any) -> dict[str, str]:
    """What a file of weights says of a network of diffusers, so that it is built again: its config."""
    return {CONFIG_KEY: json.dumps(constructor_numbers(dict(network.config)))}


def class_names(config: Mapping[str, Any]) -> set[str]:
    """The classes that a config of diffusers (`_class_name`) or transformers (`architectures`) is of."""
    named = config.get("architectures")
    names = [config.get("_class_name"), *(named if isinstance(named, list | tuple) else [named])]
    return {name for name in names if name and isinstance(name, str)}


def construct(kind: Callable[..., T], config: Mapping[str, Any], key: str) -> T:
    """A network of diffusers, or a config of transformers, by the numbers of a file.

    Raises:
        UserError: `kind` does not take them, or they are of a network that no computer could build.
    """
    check_layers(config, kind.__name__, key)
    return built(partial(kind, **constructor_numbers(config)), kind.__name__, key)


def built(make: Callable[[], T], name: str, key: str) -> T:
    """What `make` makes of the numbers of a file: a `name`, as errors call it.

    Raises:
        UserError: they make none.
    """
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # libraries check little of what a config says: anything may follow from it
        reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
        raise UserError(f"{key}: its config is none of {name}: {shortened(reason, 500)}") from error


def check_layers(config: Mapping[str, Any], name: str, key: str) -> None:
    """Raise UserError where the config of a `name` asks for more layers than any network has."""
    for one, value in config.items():
        if _is_endless(value, is_count="layers" in one or "blocks" in one):
            raise UserError(f"{key}: its config is none of {name}: {one} is {brief(value)}")


def _is_endless(value: Any, is_count: bool) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > MAX_LAYERS or any(_is_endless(one, is_count) for one in value)
    return is_count and isinstance(value, int | float) and value > MAX_LAYERS


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a weights file, or of a folder's one or several; see `each_tensor`."""
    return dict(each_tensor(path, key))


def each_tensor(
    path: Path, key: str, is_wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weights file, or of a folder's one or several, one by one.

    A file is mapped into memory: only the tensors that are kept take any.

    Args:
        is_wanted: whether to read the tensor of a name.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    for file in files_of(path) if path.is_file() else weights_files(path, key):
        if file.suffix == PICKLED.suffix:
            state = read_weights(file, key)
            yield from ((name, state[name]) for name in state if is_wanted(name))
            continue
        opened = _open(file, key)
        try:
            for name in opened.keys():  # noqa: SIM118
                if is_wanted(name):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:  # such as a dtype of the future
            raise UserError(f"{key}: {file} cannot be read as safetensors: {error}") from None


def weights_files(folder: Path, key: str) -> list[Path]:
    """The weights files of a network's folder: safetensors, or else transformers' `pytorch_model.bin`.

    Raises:
        UserError: there are none.
    """
    places = [(f"{name}.safetensors", variant) for name in FILE_NAMES for variant in VARIANTS]
    for place, variant in [*places, (PICKLED.name, "")]:
        index = folder / f"{place}.index{variant}.json"
        if index.is_file():
            return _shards(index, key)
        if (file := folder / Path(place).with_suffix(f"{variant}{Path(place).suffix}")).is_file():
            return [file]
    hint = "only .bin or .ckpt files, which are not read: convert them to safetensors" if any(
        folder.glob("*.bin")) or any(folder.glob("*.ckpt")) else "no weights"  # fmt: skip
    raise UserError(f"{key}: {folder} holds {hint} ({' or '.join(f'{name}.safetensors' for name in FILE_NAMES)})")


def _shards(index: Path, key: str) -> list[Path]:
    """The files that an index lists, which have to lie beside it."""
    parts = read_object(index, f"{key}: {index}").get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{key}: {index} lists no files (weight_map)")
    files = []
    for name in sorted(set(parts.values())):
        if name != Path(name).name or not (index.parent / name).is_file():
            raise UserError(f"{key}: {index} lists {name!r}, which is no file beside it: download the folder again")
        files.append(index.parent / name)
    return files


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    key: str,
    dtype: torch.dtype,
    deferrable: bool = False,
) -> None:
    """Give a network, which may be on the meta device, the weights of a file, strictly.

    deferrable: in a training they may wait until the network is where it lives, see `warpcore.loading`.

    Raises:
        UserError: a name or a shape differs.
    """
    check_names(network.state_dict(), tensors, path, key)
    assign(network, tensors, dtype, deferrable)


def _open(file: Path, key: str):
    if problem := why_no_file(file):
        raise UserError(f"{key}: {file} {problem}")
    try:
        return open_weights(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {file} cannot be read as safetensors: {error}") from None
