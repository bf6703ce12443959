"""The range check that every numeric field of the training config goes through."""

import math

from blackpoint.data.files.errors import UserError


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
