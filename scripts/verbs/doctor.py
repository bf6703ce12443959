"""`blackpoint doctor`: what works here, what does not, and what to do about it."""

import dataclasses
import json
import sys
import time

from blackpoint.data.files.notes import for_terminal
from blackpoint.scripts.doctor.examine import DoctorConfig, examine
from blackpoint.scripts.doctor.row import STATUSES, Row

COLOURS = {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m"}


def config_class() -> type[DoctorConfig]:
    return DoctorConfig


def run(config: DoctorConfig) -> int:
    """Prints the rows; returns 1 where one is red, else 0."""
    start_s = time.monotonic()
    rows = examine(config)
    worst = max((row.status for row in rows), key=STATUSES.index)
    seconds = round(time.monotonic() - start_s, 1)
    if config.json:
        found = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"status": worst, "seconds": seconds, "rows": found}, indent=1))
    else:
        print(table(rows, colours=sys.stdout.isatty()), end="")
        counts = [f"{sum(row.status == name for row in rows)} {name}" for name in STATUSES]
        print(f"\n{', '.join(counts)}; {seconds} s")
    return int(worst == "red")


def table(rows: list[Row], colours: bool) -> str:
    """Returns a line a row, and below it the remedy where there is one."""
    width, lines = max(len(row.name) for row in rows), []
    for row in rows:
        mark = f"{row.status:<6}"
        mark = f"{COLOURS[row.status]}{mark}\x1b[0m" if colours else mark
        lines.append(f"{mark}  {row.name:<{width}}  {for_terminal(row.finding)}\n")
        if row.remedy:
            lines.append(f"{'':{8 + width}}  -> {row.remedy}\n")
    return "".join(lines)
