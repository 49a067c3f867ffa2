"""The command that makes, extends or recreates a cache for a training, for messages."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from families.common.features import Feature, Origin
from warpcore.arguments import pairs
from warpcore.data.storage import is_remote

TOOL = "tools/cache.py"
KINDS = {"latents": "what networks make of pictures", "texts": "what they make of captions", "all": "both"}
"""The values of `--features`."""
SOURCES = {"webdataset_path": "caches", "validation_path": "validation_caches"}
"""The keys of data, and those of the caches that hold features of its samples."""


def kind_of(features: Iterable[Feature]) -> str:
    """The `--features` that make these."""
    of_picture = {feature.of_picture for feature in features}
    return "all" if len(of_picture) != 1 else "latents" if of_picture.pop() else "texts"


def cache_command(
    training: Any, folder: str, kind: str = "all", origin: Origin | None = None, data_key: str = "webdataset_path"
) -> str:
    """The whole command that makes a cache in `folder`, or extends the one that is there.

    Args:
        training: what it is for, see `families.common.cache.Cacheable`.
        kind: one of KINDS.
        origin: of the cache that is there, whose data and options are kept.
        data_key: the key of the config whose data the cache is of.
    """
    script, config, settings = _given(training)
    settings = {key: value for key, value in settings.items() if key not in {*SOURCES, *SOURCES.values()}}
    source = _source(training.config, data_key, origin)
    settings |= {"webdataset_path": source if isinstance(source, str) else json.dumps(source)}
    if training.config.validation_path is not None or data_key != "webdataset_path":
        settings["validation_path"] = "null"
    flags = ["--features", kind] if kind != "all" else []
    if origin is not None:
        flags += ["--dtype", origin.dtype] if origin.dtype != "float16" else []
        flags += ["--variants", str(origin.variants)] if origin.variants != 1 else []
    given = [f"{key}={value}" for key, value in settings.items()]
    return shlex.join(["python3", TOOL, script, config, _local(folder), *given, *flags])


def _source(config: Any, data_key: str, origin: Origin | None) -> Any:
    """What the cache is made from: the data of the config, unless these are a cache themselves."""
    named = getattr(config, data_key)
    if origin is not None and origin.source is not None:
        return origin.source
    is_cache = named in (getattr(config, SOURCES[data_key], None) or [])
    return "PICTURES" if is_cache or named is None else named


def _given(training: Any) -> tuple[str, str, Mapping[str, str]]:
    """Script, config file and settings that the training was started with."""
    script = Path(sys.modules[type(training).__module__].__file__)
    arguments = getattr(training, "arguments", None)
    if arguments is None:  # a script is run by its own file
        arguments = sys.argv[1:] if Path(sys.argv[0]).resolve() == script.resolve() else []
    arguments = list(arguments)
    has_file = bool(arguments) and "=" not in arguments[0] and not arguments[0].startswith("--")
    config = arguments.pop(0) if has_file else "CONFIG"
    return _local(str(script)), config, dict(pairs(arguments))


def _local(path: str) -> str:
    """A path as seen from here; of what lies on S3, a folder here that is to be copied there."""
    if is_remote(path):
        return path.rstrip("/").rpartition("/")[2]
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
