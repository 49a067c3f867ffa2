"""What a training configuration of another program becomes: `tools/convert_config.py` asks the families for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ConvertedConfig:
    """Keys of a training here that stand for the configuration of another program."""

    script: str
    """In `train/`, without its ending."""
    values: dict[str, Any] = field(default_factory=dict)
    """Our keys."""
    not_taken: dict[str, str] = field(default_factory=dict)
    """Why keys of the other program are not taken over, by their names there."""
    before: list[str] = field(default_factory=list)
    """Commands that come before the training; `{config}` in them is the file that is written."""


def flat(values: Mapping[str, Any], whole: frozenset[str] = frozenset(), before: str = "") -> dict[str, Any]:
    """The leaves of mappings in each other, by names with dots between: `{"A": {"B": 1}}` gives `{"A.B": 1}`.

    whole: names of mappings that are leaves.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        inner = isinstance(value, Mapping) and value and name not in whole
        found |= flat(value, whole, f"{name}.") if inner else {name: value}
    return found
