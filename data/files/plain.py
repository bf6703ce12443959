"""JSON: numbers as it can hold them, and files of it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError


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
    """Reads a file of one object; {} where there is none. Raises UserError for anything else."""
    return json_object(path.read_bytes(), path) if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one object per line; raises UserError for anything else."""
    lines = path.read_bytes().splitlines()
    return [json_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def json_object(content: bytes, where: object) -> dict[str, Any]:
    """Parses one object; raises UserError, which names `where`, for anything else."""
    value: dict[str, Any] = _parsed(content, where, dict)
    return value


def read_array(path: Path) -> list[Any]:
    """Reads a file of one array; raises UserError for anything else."""
    value: list[Any] = _parsed(path.read_bytes(), path, list)
    return value


def _parsed(content: bytes, where: object, kind: type) -> Any:
    """Parses JSON in UTF-8, which may nest deeper than Python's stack, or hold endless numbers."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UserError(f"{where} is not JSON ({reason}); it is damaged: restore it") from error
    if not isinstance(value, kind):
        raise UserError(
            f"{where} holds {type(value).__name__} instead of {kind.__name__}; restore it"
        )
    return value
