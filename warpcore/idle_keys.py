"""Keys that can have no effect beside the other keys of a config: which those are, and what is said of them."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Need:
    """What a key has no effect without. A class of keys names those of its keys in `needs`."""

    what: str
    """The other key, and where several values count, which: `lr_schedule: cosine`."""
    is_met: Callable[[Any], bool]
    """Asks the whole config."""

    @classmethod
    def of(cls, key: str) -> "Need":
        """Another key, with any value but null, false, 0, "" and an empty list."""
        return cls(key, lambda config: getattr(config, key) not in (None, False, 0, "", [], {}))


def needs_of(kind: type[BaseModel]) -> dict[str, Need]:
    """Those of the keys of a script, whichever class names them; that of a class counts before that of its bases."""
    declared = [vars(base).get("needs", {}) for base in reversed(kind.__mro__)]
    merged = {key: need for needs in declared for key, need in needs.items()}
    return {key: need for key, need in merged.items() if key in kind.model_fields and key not in kind.unused}


def idle_keys(config: BaseModel, given: Collection[str]) -> Iterator[tuple[str, Need]]:
    """Those of the given keys with another value than their default that have no effect, and what each lacks."""
    fields = type(config).model_fields
    for key, need in needs_of(type(config)).items():
        usual = fields[key].get_default(call_default_factory=True)
        if key in given and getattr(config, key) != usual and not need.is_met(config):
            yield key, need


def about_idle(config: BaseModel, given: Collection[str]) -> list[str]:
    """A line about each of those keys."""
    return [
        f"{key} has no effect without {need.what}: remove it, or change that" for key, need in idle_keys(config, given)
    ]
