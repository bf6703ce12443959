"""Rules of values: a value that breaks one is refused with its name, its value and the rule.

Free of torch. A rule of several fields is said where it is known.
"""

import math
import operator
import sys
from typing import Any

from blackpoint.data.files.errors import UserError

COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def require(holds: object, name: str, value: object, rule: str, where: str = "") -> None:
    """Raises UserError "NAME=VALUE WHERE must be RULE" unless it holds."""
    if not holds:
        raise UserError(f"{name}={value!r:.60}{where and f' {where}'} must be {rule}")


def is_number(value: Any, kind: Any = (int, float)) -> bool:
    """Whether a value from a file is a finite number, or one of that kind; true is none."""
    largest = sys.float_info.max  # a whole number may be beyond it
    return isinstance(value, kind) and not isinstance(value, bool) and -largest <= value <= largest


def check_ranges(config: object, section: str, **rules: str) -> None:
    """Raises UserError for a field of `config` out of its range, such as beta=">= 0 and < 1".

    Numbers must be finite; a field that is None has none. Messages call it by `section` and name.
    """
    for name, rule in rules.items():
        value = getattr(config, name)
        bounds = [bound.split() for bound in rule.split(" and ")]
        if value is not None and not (
            math.isfinite(value) and all(COMPARE[sign](value, float(b)) for sign, b in bounds)
        ):
            raise UserError(f"{section}{name}={value} is out of range; it must be {rule}")
