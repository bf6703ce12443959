"""Rows as CSV, and numbers as JSON can hold them."""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Writes rows as CSV; there is at least one, and all have the columns of the first."""
    rows = iter(rows)
    first = next(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(first), lineterminator="\n")
    writer.writeheader()
    writer.writerow(first)
    writer.writerows(rows)
    return text.getvalue()


def finite(value: object) -> Any:
    """Returns a tree of containers with null for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
