"""YAML that anyone may have written: plain values only, read in time and memory that follow from the text's length.

Numbers are those that people mean: not in base 60 (16:9), not octal (007), no dates, and no more than 40 digits. What
is left out so is text.
"""

import re
from typing import Any

import yaml

from warpcore.errors import ConfigError
from warpcore.text import shortened

MAX_LEVELS = 50
"""Of lists and mappings inside of each other, aliases included."""
MAX_ALIASED = 50_000
"""What aliases may make of a short text: values and characters. Of a long one, twice its length."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,39}|0x[0-9a-fA-F_]{1,16})$")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML spells. Nothing in it is executed.

    where: the name of the text, for messages.

    Raises:
        ConfigError: it is not YAML, or stands for far more than its length.
    """
    try:
        loader = _Loader(text)
        loader.most = max(MAX_ALIASED, 2 * len(text))
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{shortened(where)} is not valid YAML: {shortened(str(error), 500)}") from None


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """The keys that YAML spells; none where the text is empty.

    Raises:
        ConfigError: as `parse_yaml`, or it is something else than `key: value` lines.
    """
    found = parse_yaml(text, where)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected `key: value` lines, found a {type(found).__name__}")
    return found


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in ("null", "bool", "merge")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*_TAGS, None)}

    def __init__(self, text: str):
        super().__init__(text)
        self.most = MAX_ALIASED
        self._level = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}
        """Of a node, with those that aliases in it stand for: values and characters, and levels."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuses what is nested too deeply, holds itself, grows by aliases of aliases, or is no plain value."""
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_TAGS):  # before a %TAG line can make one long text of each
            raise _error(f"the tag {shortened(tag)} means nothing here: remove it", event)
        if self._level == MAX_LEVELS:
            raise _error(f"nested more than {MAX_LEVELS} levels deep", event)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            raise _error(f"*{shortened(event.anchor)} holds itself", event)
        size, levels = self._sizes[node]
        if self._level + levels > MAX_LEVELS:
            raise _error(f"nested more than {MAX_LEVELS} levels deep, by aliases of aliases", event)
        if size > self.most:
            raise _error(f"stands for more than {self.most} values, by aliases of aliases", event)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value), 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        sizes = [self._sizes[part] for part in parts]
        return 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuses a key that stands in a mapping twice, of which YAML would take the last one unseen."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _error(f"{shortened(key.value)} stands there twice", key)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # of text with a tag, such as `!!int ten`
            kind = node.tag.rpartition(":")[2]
            raise _error(f"{shortened(str(node.value))} is no {kind}", node) from error


def _error(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, where.start_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
