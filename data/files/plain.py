"""JSON: numbers as it can hold them, and files of it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def recorded(scores: Mapping[str, float]) -> dict[str, float | str]:
    """Returns scores as JSON has them: "NaN", "Infinity" and "-Infinity" for what is not finite.

    Those are the words of Protocol Buffers' JSON; JSON's own numbers are finite.
    """
    return {
        name: value if math.isfinite(value) else json.dumps(value) for name, value in scores.items()
    }


def number(value: float | str | None) -> float:
    """Reads a recorded score; NaN for null, which stands for any that is not finite in old rows."""
    return math.nan if value is None else float(value)


def finite(value: object) -> Any:
    """Returns a tree of containers with null for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Reads a file; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
