"""What a run begins with and keeps when it is resumed: its target, the defaults of its keys, and the weights of its
frozen base.

What weights files say of themselves is obeyed where the config is silent; where it says otherwise, that is an error.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from families.common.config import DiffusionConfig
from families.common.weight_files import FAMILY_KEY, GENERATOR, TARGET_KEY, contradictions, files_of, metadata_of
from warpcore.config import ConfigError
from warpcore.files import open_to_read

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
"""How much of a large file is read to know it again: even a short finetuning changes all of its tensors."""


def with_target(
    config: DiffusionConfig, about: Mapping[str, str] | None, said: str | None, default: str = "epsilon"
) -> DiffusionConfig:
    """The config with a `diffusion_target`: of the checkpoint that is resumed, else of the weights to start from.

    Args:
        about: what the files of the checkpoint say of themselves, None in a new run.
        said: the target that the weights to start from say, if they do.
        default: the target where nothing says one.

    Raises:
        ConfigError: a new run's config contradicts its files.
    """
    given, base = config.diffusion_target, config.generator_checkpoint_path
    if about is not None:
        return config.model_copy(update={TARGET_KEY: given or about.get(TARGET_KEY, default)})
    if given and said and given != said and not config.change_target:
        raise ConfigError(
            f"diffusion_target: {given} contradicts {base}, which says that its network predicts {said}. Leave the "
            "key out, or write change_target: true to teach the network the other"
        )
    return config.model_copy(update={TARGET_KEY: given or said or default})


def with_first_defaults(config: DiffusionConfig, first: Mapping[str, Any]) -> tuple[DiffusionConfig, list[str]]:
    """The config of a run that is older than some keys: what it does not name of them is as that run began.

    Args:
        first: by key, what was done before there was such a key.

    Returns:
        The config, and what to tell of it.
    """
    lacking = {key: value for key, value in first.items() if key not in config.model_fields_set}
    told = ", ".join(f"{key}: {'null' if value is None else value}" for key, value in lacking.items())
    note = f"{told}: this run is older than the key, and goes on as it began, unless its config says otherwise"
    return config.model_copy(update=lacking), [note] if lacking else []


def check_family(config: DiffusionConfig, family: str) -> None:
    """Raise ConfigError where `generator_checkpoint_path` of a config names weights that say another family."""
    path = config.generator_checkpoint_path
    if path is not None and (said := metadata_of(path).get(FAMILY_KEY, family)) != family:
        raise ConfigError(f"{GENERATOR}: {path} says that it is of {said}, not of {family}: name other weights")


def check_start_file(config: DiffusionConfig, key: str, about: Sequence[str]) -> None:
    """Raise ConfigError where the weights that a key of the config names were trained for another kind of network.

    about: the keys of which they may say nothing else, beside what the network predicts.
    """
    path = getattr(config, key, None)
    wrong = contradictions(path, config, (TARGET_KEY, *about))
    if config.change_target:
        wrong.pop(TARGET_KEY, None)
    if wrong:
        raise ConfigError(
            f"{key}: {path} says that it was trained with "
            + ", ".join(f"{name} {said}, not {here}" for name, (said, here) in wrong.items())
            + ": take another file, or write what it says"
        )


def same_base(path: Path | None, before: Mapping[str, str] | None) -> dict[str, str] | None:
    """What tells the weights of a frozen base from others, the name of its file or folder and a hash; None without.

    Raises:
        ConfigError: the run was trained on other weights, those of `before`.
    """
    if path is None or not path.exists():
        return None
    hashes = [_hash(file) for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else files_of(path))]
    joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    here = {"file": str(path), "hash": joined}
    if before is not None and before["hash"] != here["hash"]:
        raise ConfigError(
            f"generator_checkpoint_path: this run was trained on {before['file']} ({before['hash'][:12]}...), but "
            f"{path} holds other weights ({here['hash'][:12]}...). Name the weights that it was trained on, or choose "
            "another experiment_id"
        )
    return here


def _hash(path: Path) -> str:
    """SHA-256 of a file's size and of blocks spread over it."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open_to_read(path) as file:
        for block in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            found.update(file.read(_BLOCK_BYTES))
    return found.hexdigest()
