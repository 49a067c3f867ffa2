"""What weights files and runs say of themselves; only headers are read."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from safetensors import SafetensorError

from modules.pickled_weights import read_pickled
from modules.safetensors_files import open_weights
from warpcore.config import Settings
from warpcore.errors import UserError
from warpcore.exports import INDEX, is_index, read_index
from warpcore.files import require_file

GENERATOR, AUTOENCODER, TEXT = (
    "generator_checkpoint_path", "autoencoder_checkpoint_path", "text_encoder_checkpoint_path",
)  # fmt: skip
"""The config keys that name the networks of a pipeline."""
RUN_CONFIG = "config.yaml"
"""The file of a run's folder that holds its settings."""
FAMILY_KEY = "family"
"""Where a weights file may name its family."""
TARGET_KEY = "diffusion_target"
"""Where a weights file says what its network predicts."""

logger = logging.getLogger(__name__)


class Header(NamedTuple):
    """What a weights file says without its tensors: their names, its metadata (safetensors only), and their shapes,
    which an index of several files does not tell."""

    names: frozenset[str]
    metadata: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def read_header(path: Path) -> Header:
    """The header of a safetensors file, or of a PyTorch file (`.ckpt`, `.pt`, ...), in which no code is run; or of a
    network in several files, by its index.

    Raises:
        UserError: the file cannot be read as weights.
    """
    require_file(path)
    if is_index(path):
        index = read_index(path)
        return Header(frozenset(index.files), index.about)
    if path.suffix != ".safetensors":
        shapes = _pickled_shapes(path)
        return Header(frozenset(shapes), {}, shapes)
    try:
        with open_weights(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Header(frozenset(shapes), file.metadata() or {}, shapes)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By name; () of what is no tensor."""
    try:
        state = read_pickled(path, map_location="meta", mmap=True)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
    return {name: tuple(getattr(one, "shape", ())) for name, one in state.items() if isinstance(name, str)}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of several by their index; empty without a file, or in other formats."""
    known = path.suffix == ".safetensors" or is_index(path)
    return read_header(path).metadata if known and path.is_file() else {}


def target_of(path: Path | str | None) -> str | None:
    """What the network of a weights file predicts, where the file says so."""
    return metadata_of(Path(str(path or ""))).get(TARGET_KEY)


def contradictions(path: Path | None, settings: Settings, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What a weights file says of itself and the settings say otherwise, by key: (in the file, in the settings)."""
    about = metadata_of(path) if path is not None else {}
    here = {key: str(getattr(settings, key)) for key in keys}
    return {key: (about[key], value) for key, value in here.items() if about.get(key, value) != value}


def exported_file(folder: Path, name: str) -> Path | None:
    """The file with the exported weights `name` of a run, the index of several, or None: it has not exported them."""
    return next((file for ending in (".safetensors", INDEX) if (file := folder / f"{name}{ending}").is_file()), None)


def files_of(path: Path) -> list[Path]:
    """The files that hold what a path to weights leads to: that file, or those of an index.

    Raises:
        UserError: the index is damaged, or files are of another export than it.
    """
    if not is_index(path):
        return [path]
    index = read_index(path)
    files = sorted(set(index.files.values()))
    for file in files:
        update, own = index.about.get("update"), metadata_of(file).get("update")
        if own != update and file.is_file():
            raise UserError(f"{file} is of update {own}, but {path.name} of {update}: its run ended between the two")
    return files


def weights_of_run(folder: Path, name: str, use_ema: bool) -> Path | None:
    """The exported weights `name` of a run, or None: its average where `use_ema` asks for it and it is not older."""
    plain, average = exported_file(folder, name), exported_file(folder, f"{name}_ema")
    if average is None or not use_ema:
        return plain
    if plain is None:
        return average
    made, averaged = map(_update_of, (plain, average))
    if averaged < made:
        logger.warning("%s is of update %d and %s of %d: taking the latter", average, averaged, plain.name, made)
        return plain
    return average


def _update_of(file: Path) -> int:
    """The update after which a file was written; 0 where it doesn't say that."""
    said = metadata_of(file).get("update", "")
    return int(said) if re.fullmatch(r"[0-9]{1,18}", said) else 0


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run; other programs write a `config.yaml`, too, beside `checkpoints`."""
    return (folder / RUN_CONFIG).is_file() and not (folder / "checkpoints").exists()


def weights_in(place: Path, name: str, use_ema: bool = True) -> Path:
    """The exported weights `name` of a run where `place` is a run's folder, else `place` itself.

    Raises:
        UserError: the run trained something else, or has not saved yet.
    """
    if not is_run(place):
        return place
    found = weights_of_run(place, name, use_ema)
    if found is None:
        there = ", ".join(sorted(file.name for file in place.glob("*.safetensors"))) or "no weights yet"
        raise UserError(f"{name}: the training run {place} holds no {name}.safetensors, but {there}")
    return found
