"""Keeps what a sweep found in a folder of the repository: python -m
blackpoint.scripts.studies.keep_sweep.

settings, cells, wins_*   the report's tables, .md and .csv
rows.csv.gz               one row per image, or a winner, of every cell
figure.png                each setting's metrics, over the seeds
candidates.csv.gz         a row per candidate of searches with several scores of each
made.json                 machine, date, seconds of every cell, versions
"""

import difflib
import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import read_json
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.summary import WORDS
from blackpoint.sampling.report.plots import COLORS, STYLE, draw_named, panels
from blackpoint.sampling.report.results import CELL, SWEEP, Results, read_results, title_of
from blackpoint.sampling.report.results_page import table_files, tables_of
from blackpoint.sampling.report.results_plots import luminance_distributions, scaling_curves
from blackpoint.sampling.report.results_tables import metric_names, settings_of, shown_estimate
from blackpoint.sampling.statistics.table import write_csv
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script
from blackpoint.train.records.environment import describe_environment

DIGITS, TITLE_LETTERS = 6, 26
ROWS, CANDIDATE_ROWS, MADE = "rows.csv.gz", "candidates.csv.gz", "made.json"
COLUMNS = ("cell", "prompt_index", "image")
"""Of these rows, before those of the metrics."""


@dataclass
class KeepConfig:
    """Which sweep, and where to."""

    run_dir: str = "runs/ablation"
    """The sweep."""
    output: str = "docs/ablation"
    """Folder to write; what is there is replaced."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the figure and of the table of settings, in order; the first six if empty."""
    tables: list[str] = field(default_factory=lambda: ["*"])
    """Names of the tables that are kept, with * for any letters."""


def keep(config: KeepConfig, results: Results | None = None) -> list[Path]:
    """Writes everything; returns the paths. Raises UserError for a metric that no cell has.

    `results` are those of the sweep's folder, or more than them.
    """
    output = Path(config.output)
    results = results or read_results(Path(config.run_dir))
    names = _known(config.metrics, metric_names(results.cells)) or metric_names(results.cells)[:6]
    tables = [
        table
        for table in tables_of(results, names)
        if any(fnmatch(table.name, pattern) for pattern in config.tables)
    ]
    contents: dict[str, str | bytes] = {**table_files(tables)}
    seconds = read_json(output / MADE).get("cell_seconds", {})
    seconds |= cell_seconds(Path(config.run_dir))
    made = describe_environment() | {
        "machine": describe_machine(),
        "kept": time.strftime("%Y-%m-%d"),
        "cell_seconds": {c.name: seconds[c.name] for c in results.cells if c.name in seconds},
    }
    del made["command"]  # of this script, not of the sweep
    contents[MADE] = json.dumps(made, indent=1) + "\n"
    for number, (_, svg) in enumerate(scaling_curves(results, names)):
        contents[f"scaling_{number}.svg"] = svg
    luminance = luminance_distributions(results)
    if luminance is not None:
        contents["luminance.svg"] = luminance
    contents["figure.png"] = figure(results, names)
    for name, content in contents.items():
        write_whole(output / name, content)
    write_csv(output / ROWS, rows_of(results), COLUMNS)
    paths = [output / name for name in (*contents, ROWS)]
    candidates = list(candidate_rows(results))
    if candidates:
        paths.append(output / CANDIDATE_ROWS)
        write_csv(paths[-1], candidates)
    return paths


def rows_of(results: Results) -> Iterable[dict[str, Any]]:
    """Yields a row for each image, or winner, with its scores."""
    names = list(dict.fromkeys(name for cell in results.cells for name in cell.paired))
    for cell in results.cells:
        keys = sorted({key for scores in cell.paired.values() for key in scores})
        for key in keys:
            yield {
                **dict(zip(COLUMNS, (cell.name, key[0], key[-1]), strict=True)),
                **{name: _rounded(cell.paired.get(name, {}).get(key)) for name in names},
            }


def candidate_rows(results: Results) -> Iterable[dict[str, Any]]:
    """Yields a row for each candidate of cells that have several scores of theirs."""
    several = {
        cell.name: cell.candidates.scores
        for cell in results.cells
        if cell.candidates is not None and len(cell.candidates.scores) > 1
    }
    names = list(dict.fromkeys(name for scores in several.values() for name in scores))
    for cell, scores in several.items():
        for prompt, candidate in np.ndindex(next(iter(scores.values())).shape):
            yield {"cell": cell, "prompt": prompt, "candidate": candidate} | {
                name: _rounded(float(scores[name][prompt, candidate])) if name in scores else ""
                for name in names
            }


def cell_seconds(run_dir: Path) -> dict[str, float]:
    """Returns the seconds that each cell of a sweep took, without its training."""
    records = {
        row["name"]: read_json(run_dir / row["folder"] / CELL)
        for row in read_json(run_dir / SWEEP).get("cells", [])
    }
    return {name: record.get("seconds") for name, record in records.items() if record}


@matplotlib.rc_context(STYLE)
def figure(results: Results, names: Sequence[str]) -> bytes:
    """Draws each metric, a line per setting: seeds as dots, their mean with its t interval."""
    settings = settings_of(results)
    sheet, axes = panels(len(names), 1, width=2.6, height=0.6 + 0.28 * len(settings))
    for axis, name in zip(axes, names, strict=True):
        for line, cells in enumerate(settings.values()):
            values = [c.values[name].estimate.value for c in cells if name in c.values]
            color = COLORS[min(line, 1)]
            axis.plot(values, [line] * len(values), "o", color=color, alpha=0.35, markersize=4)
        names_left = [setting if axis is axes[0] else "" for setting in settings]
        estimates = [shown_estimate(cells, name) for cells in settings.values()]
        draw_named(axis, names_left, estimates, "|")
        title = "\n".join(wrap(title_of(name, results.cells), TITLE_LETTERS))
        axis.set_title(title, loc="left", fontsize=9)
        better = next(c.values[name].better for c in results.cells if name in c.values)
        axis.set_xlabel(WORDS[better])
    content = io.BytesIO()
    sheet.savefig(content, format="png", dpi=130, bbox_inches="tight")
    return content.getvalue()


def _known(names: list[str], metrics: list[str]) -> list[str]:
    for name in names:
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1, cutoff=0)
            raise UserError(f"metrics: no cell has {name!r}; the nearest is {near[0]!r}")
    return names


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.{DIGITS}g}"


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("keep_sweep", lambda: keep(load(KeepConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
