"""metrics.csv: one row a number, `step,name,value`, appended as it is measured.

`step` counts the optimizer steps done. A number is written once for a step: when a run resumes at
step N, rows beyond N and a last line that a kill left torn are dropped, and the run writes them
again; from step 0 on also those of the base, step 0. No import of Lightning: a report reads the
file too.
"""

from pathlib import Path

from blackpoint.data.files.whole_file import write_whole

HEADER = ("step", "name", "value")


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads metrics.csv as name -> [(step, value), ...] in the order written."""
    series: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in _whole_rows(path):
        series.setdefault(name, []).append((step, value))
    return series


def rows_after(path: Path, step: int) -> set[tuple[int, str]]:
    """Returns (step, name) of the whole rows beyond `step`; none without a file."""
    last = step or -1
    return {row[:2] for row in _whole_rows(path) if row[0] > last} if path.exists() else set()


def drop_rows_after(path: Path, step: int) -> None:
    """Keeps the whole rows up to `step`, or starts the file with its header."""
    last = step or -1
    rows = [row for row in _whole_rows(path) if row[0] <= last] if path.exists() else []
    lines = [
        ",".join(HEADER),
        *(f"{row_step},{name},{value:.8g}" for row_step, name, value in rows),
    ]
    write_whole(path, "\n".join([*lines, ""]))


def _whole_rows(path: Path) -> list[tuple[int, str, float]]:
    rows = []
    text = path.read_text(encoding="ascii", errors="replace")
    for line in text[: text.rfind("\n") + 1].splitlines()[1:]:
        parts = line.split(",")
        try:
            row = int(parts[0]), parts[1], float(parts[2])
        except (ValueError, IndexError):
            continue  # torn by a kill
        if row[0].bit_length() < 64:  # no step is beyond
            rows.append(row)
    return rows
