"""Nested settings as dotted keys."""

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections to dotted keys; the later of two spellings of a key wins."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            values |= flat(value, f"{path}.")
        else:
            values.pop(path, None)
            values[path] = value
    return values


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections that `flat` made dotted keys of."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return tree


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Returns the value at a dotted key, or None."""
    value: Any = tree
    for word in key.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value
