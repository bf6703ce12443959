"""Samples that can't be used: how they are counted, named and, above a share, refused.

A data set of N samples may lose at most `max_bad_share * N` of them. What is lost is listed by
key and reason; above the limit the run stops with that list.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blackpoint.data.files.errors import UserError

NUM_LISTED = 20
MAX_SHOWN_CHARACTERS = 200


class BadSample(NamedTuple):
    """A sample that can't be used: the key or file that names it, and the reason."""

    key: str
    reason: str


def too_many(num_bad: int, num_samples: int, max_bad_share: float) -> bool:
    """Tells whether `num_bad` of `num_samples` is above the share that a run may lose."""
    return num_bad > max_bad_share * num_samples


def kind(reason: str) -> str:
    """Returns the kind of a reason: its words before the colon."""
    return reason.split(":")[0]


def printable(text: str) -> str:
    """Returns `text` fit for a terminal: control characters and half characters escaped, cut."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:MAX_SHOWN_CHARACTERS]
    )
    return shown if len(text) <= MAX_SHOWN_CHARACTERS else f"{shown}..."


def listing(bad: Sequence[BadSample]) -> str:
    """Returns one indented line a bad sample, the first 20 of them, and how many are left."""
    lines = [
        f"  {printable(sample.key)}: {printable(sample.reason)}" for sample in bad[:NUM_LISTED]
    ]
    if len(bad) > NUM_LISTED:
        lines.append(f"  ... and {len(bad) - NUM_LISTED} more")
    return "\n".join(lines)


def refusal(
    where: str, bad: Sequence[BadSample], num_samples: int, max_bad_share: float, field: str
) -> UserError:
    """Returns the error that stops a run which lost more samples than `field` allows."""
    return UserError(
        f"{where}: {len(bad)} of {num_samples} samples can't be used, "
        f"above {field}={max_bad_share:g}; repair or remove them, or raise {field}:\n"
        f"{listing(bad)}"
    )


def write_list(path: Path, bad: Sequence[BadSample]) -> None:
    """Writes one JSON line a bad sample; an empty file says that there was none."""
    with path.open("w", encoding="utf-8") as file:
        for sample in bad:
            file.write(json.dumps({"key": sample.key, "reason": sample.reason}) + "\n")


def read_list(path: Path) -> list[BadSample]:
    """Reads the list of `write_list`."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [BadSample(row["key"], row["reason"]) for row in rows]
