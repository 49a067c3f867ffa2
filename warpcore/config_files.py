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

from warpcore.data.storage import local_path
from warpcore.errors import ConfigError
from warpcore.files import why_no_file
from warpcore.safe_yaml import parse_mapping
from warpcore.text import brief, is_whole, read_text

BASE = "base"
MAX_CHAIN = 20
"""Files of which each starts from the next."""
MAX_FILE_BYTES = 10_000_000
Keys = tuple[dict[str, Any], dict[str, Path]]


def read_config(path: Path) -> Keys:
    """The keys of a config file and of its bases, and the file in which each of them stands.

    Raises:
        ConfigError: a file is missing, is not a mapping of keys in YAML, or is among its own bases.
        UserError: a base is a URL.
    """
    return _read(path, (), {})


def _read(path: Path, chain: tuple[Path, ...], known: dict[str, Keys]) -> Keys:
    """chain: the files that led to this one. known: what was read before, as two files may start from the same."""
    name = os.path.realpath(path)
    if name in map(os.path.realpath, chain):
        raise ConfigError(
            f"{BASE}: a config is among its own bases: {_shown((*chain, path))}; remove one of these lines"
        )
    if len(chain) == MAX_CHAIN:
        raise ConfigError(
            f"{BASE}: more than {MAX_CHAIN} configs, each of which starts from the next: {_shown((*chain, path))}"
        )
    if name not in known:
        own = read_mapping(path, f" ({BASE}: {_shown((*chain, path))})" if chain else "")
        values: dict[str, Any] = {}
        files: dict[str, Path] = {}
        for base in _names(own.pop(BASE, []), path):
            base_values, base_files = _read(path.parent / local_path(base), (*chain, path), known)
            values |= base_values
            files |= base_files
        known[name] = values | own, files | dict.fromkeys(own, path)
    return known[name]


def read_mapping(path: Path, led: str = "") -> dict[str, Any]:
    """The keys of a file of `key: value` lines alone, without those of its bases.

    led: which files led to it, for messages.

    Raises:
        ConfigError: it is missing, or is not a mapping of keys in YAML.
    """
    if problem := why_no_file(path):
        raise ConfigError(f"config file {path} {problem}{led}")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ConfigError(f"config file {path} has {size} bytes{led}: no config needs more than {MAX_FILE_BYTES}")
    return parse_mapping(read_text(path), str(path))


def bases_from(path: Path, folder: Path) -> list[str]:
    """The bases of a config file, as a config in another folder names them."""
    bases = (path.parent / local_path(name) for name in _names(read_mapping(path).get(BASE, []), path))
    return [os.path.relpath(base, folder) for base in bases]


def _names(bases: Any, path: Path) -> list[str]:
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) and name and is_whole(name) for name in names):
        raise ConfigError(
            f"{BASE}: found {brief(bases)} in {path}; write the name of a config file, or a list of them"
        )
    return names


def _shown(chain: tuple[Path, ...]) -> str:
    return " -> ".join(map(str, chain))
