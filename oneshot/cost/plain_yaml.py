"""YAML and JSON of plain data, from files that anybody may have written.

No object is made of a tag, a key that stands twice is an error, and what aliases and merge keys stand for is counted
before it is built: ten lines of ``&b [*a, *a, ...]`` are 10**10 values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, final

import yaml

__all__ = ["ERRORS", "PlainLoader", "load_yaml", "no_duplicates"]

_MOST = 1_000_000  # values with all aliases written out
_DEEPEST = 100
_LONGEST_NUMBER = 1000  # characters; a number to base 60, 1:59:59:..., takes their square

ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, TypeError)
"""What reading raises: PyYAML lets all but the first through from the values of damaged scalars, as 2001-99-99,
``!!bool x``, ``!!int ''`` and ``!!timestamp x``."""


def load_yaml(text: str) -> Any:
    """The plain data of a YAML text; raises one of ``ERRORS``.

    >>> load_yaml("a: &x [1, 2]\\nb: *x")
    {'a': [1, 2], 'b': [1, 2]}
    """
    return yaml.load(text, Loader=PlainLoader)


@final
class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with bounds."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(f"lists or mappings in one another, deeper than {_DEEPEST}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _check_size(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            _check_once([(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        if ":" in str(node.value) and len(str(node.value)) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(str(node.value)):,} characters")
        return super().construct_yaml_int(node)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)


def _check_size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node stands for; an alias as often as it is used."""
    if node in known:
        return known[node]
    known[node], inner = 1, []  # 1 inside of itself
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[node] = 1 + sum(_check_size(part, known) for part in inner)
    if known[node] > _MOST:
        raise ValueError(f"more than {_MOST:,} values, aliases written out")
    return known[node]


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``object_pairs_hook``; ValueError for a key that stands twice."""
    _check_once([("", key) for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: Sequence[tuple[str, str]]) -> None:
    if len(set(keys)) != len(keys):
        (_, twice), _ = Counter(keys).most_common(1)[0]
        raise ValueError(f"key {twice[:80]!r} stands twice in one mapping")
