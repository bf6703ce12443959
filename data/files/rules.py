"""What values must be: whatever breaks a rule is refused with its name, its value and the rule.

Free of torch. A rule of several fields is said where it is known.
"""

import math
import sys
from typing import Any

from blackpoint.data.files.errors import UserError


def require(holds: object, name: str, value: object, rule: str, where: str = "") -> None:
    """Raises UserError "NAME=VALUE WHERE must be RULE" unless it holds."""
    if not holds:
        place = f" {where}" if where else ""
        raise UserError(f"{name}={value!r:.60}{place} must be {rule}")


def is_number(value: Any, kind: Any = (int, float)) -> bool:
    """Whether a value from a file is a finite number, or one of that kind; true is none."""
    largest = sys.float_info.max  # a whole number may be beyond it
    return isinstance(value, kind) and not isinstance(value, bool) and -largest <= value <= largest


def check_range(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises UserError naming the field, its value and the rule, unless the value is in range."""
    rules = [
        (at_least, f">= {at_least}", lambda limit: value >= limit),
        (above, f"> {above}", lambda limit: value > limit),
        (at_most, f"<= {at_most}", lambda limit: value <= limit),
        (below, f"< {below}", lambda limit: value < limit),
    ]
    broken = [text for limit, text, holds in rules if limit is not None and not holds(limit)]
    if broken or not math.isfinite(value):
        wanted = " and ".join(text for limit, text, _ in rules if limit is not None)
        raise UserError(f"{name}={value} is out of range; it must be {wanted or 'finite'}")
