"""A config file and those that it starts from become one mapping of keys.

    base: finetune_c.yaml                     # or a list; file names are relative to the file that names them
    base: [cosmos_2b.yaml, fsdp_8.yaml]

Files are read in this order, and a later one wins: the first base, with the bases of its own before it, the other
bases, then the file itself. A key wins as a whole: a list or a mapping (such as `controlnet_filter_params`) replaces
that of a base, and is not merged with it; `null` takes a base's value away. Paths in a base mean what they mean in any
config: they are relative to the folder in which the script is started.
"""

import os
from pathlib import Path
from typing import Any

from warpcore.arguments import parse_yaml
from warpcore.data.storage import local_path
from warpcore.errors import ConfigError
from warpcore.text import read_text

BASE = "base"


def read_config(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Path]]:
    """The keys of a config file and of its bases, and the file in which each of them stands.

    chain: the files that led to this one.

    Raises:
        ConfigError: a file is missing, is not a mapping of keys in YAML, or is among its own bases.
        UserError: a base is a URL.
    """
    if path.resolve() in (file.resolve() for file in chain):
        raise ConfigError(
            f"{BASE}: a config is among its own bases: {_shown((*chain, path))}; remove one of these lines"
        )
    if not path.is_file():
        led = f" ({BASE}: {_shown((*chain, path))})" if chain else ""
        raise ConfigError(f"config file {path} does not exist{led}")
    own = parse_yaml(read_text(path), str(path))
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(own).__name__}")
    values: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for name in _names(own.pop(BASE, []), path):
        base_values, base_files = read_config(path.parent / local_path(name), (*chain, path))
        values |= base_values
        files |= base_files
    return values | own, files | dict.fromkeys(own, path)


def bases_from(path: Path, folder: Path) -> list[str]:
    """The bases of a config file, as a config in another folder names them."""
    own = parse_yaml(read_text(path), str(path)) or {}
    bases = (path.parent / local_path(name) for name in _names(own.get(BASE, []), path))
    return [os.path.relpath(base, folder) for base in bases]


def _names(bases: Any, path: Path) -> list[str]:
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{BASE}: found {bases!r} in {path}; write the name of a config file, or a list of them")
    return names


def _shown(chain: tuple[Path, ...]) -> str:
    return " -> ".join(map(str, chain))
