"""Keys of a configuration that a script has no use for: refused, unless they change nothing."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from warpcore.config_files import MAX_FILE_BYTES
from warpcore.data.storage import complete_url, read_small
from warpcore.errors import ConfigError
from warpcore.safe_yaml import parse_mapping
from warpcore.text import decode_text

logger = logging.getLogger(__name__)


def check_unused(config: BaseModel, keys: Collection[str], files: Mapping[str, Path]) -> None:
    """Raise ConfigError for one of the keys, given in the config, that has neither its default nor the value that the
    saved config of the same run has; those are logged.

    files: the config file in which a key stands, for the message.
    """
    fields = type(config).model_fields
    given = config.model_dump(mode="json", include=set(keys))
    usual = {key for key in given if getattr(config, key) == fields[key].get_default(call_default_factory=True)}
    saved = _saved_config(config) if given.keys() - usual else {}
    wrong = [key for key in sorted(given.keys() - usual) if key not in saved or saved[key] != given[key]]
    if wrong:
        where = ", ".join(dict.fromkeys(str(files[key]) for key in wrong if key in files)) or "the config"
        raise ConfigError(f"{', '.join(wrong)}: this script has no use for it; remove it from {where}")
    for key in sorted(given):
        logger.log(logging.INFO if key in usual else logging.WARNING, "%s: this script has no use for it", key)


def _saved_config(config: BaseModel) -> dict[str, Any]:
    """What an earlier start of the run has saved; nothing where there is none."""
    if not hasattr(config, "run_place"):
        return {}
    url = complete_url(f"{config.run_place}/config.yaml")
    try:
        return parse_mapping(decode_text(read_small(url, MAX_FILE_BYTES), url), url)
    except FileNotFoundError:
        return {}
