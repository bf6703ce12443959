"""Nested settings as dotted keys."""

from collections.abc import Iterable, Mapping
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


def renamed(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    """Maps each dotted name to the one with its first steps as `table` calls them.

    Names that begin with none of its keys, which never lie in one another, are left out.
    """
    result = {}
    for name in names:
        steps = name.split(".")
        heads = (".".join(steps[:n]) for n in range(1, len(steps) + 1))
        head = next((head for head in heads if head in table), None)
        if head is not None:
            result[name] = table[head] + name[len(head) :]
    return result
