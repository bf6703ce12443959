"""The page of `blackpoint report` about a training run, its evaluation and its search."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import read_json
from blackpoint.data.files.signals import sleep
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.report.page import Facts, Items, Page, Part, Section
from blackpoint.sampling.report.results import Results, read_results
from blackpoint.sampling.report.results_page import gallery, tables_of
from blackpoint.sampling.report.results_plots import luminance_parts
from blackpoint.sampling.report.search_page import search_section
from blackpoint.sampling.report.training_page import (
    at_a_glance,
    previews,
    run_figures,
    shown_settings,
    subject,
)
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.verbs.report_config import ReportConfig, is_about_results
from blackpoint.train.records.metrics_file import read_metrics

EARLIER = (
    "black_point/ holds what an earlier version sampled, with its numbers in summary.md; "
    "`blackpoint evaluate configs/black_point.yaml` measures the same now."
)


def write(config: ReportConfig, introduction: str | None = None) -> Path:
    """Writes the page and returns its path; the file is whole or as it was before."""
    run_dir = config.folder
    evaluation = Path(config.evaluation) if config.evaluation else run_dir / "evaluation"
    path = Path(config.output) if config.output else run_dir / "report.html"
    while True:
        live = bool(config.every_s) and not is_finished(run_dir)
        page = page_of(run_dir, evaluation, introduction)
        write_whole(path, replace(page, refresh_s=config.every_s if live else 0).html())
        if not live:
            return path
        sleep(config.every_s)


def is_finished(run_dir: Path) -> bool:
    """Whether the metrics of a run have reached its last step; also where that is not known."""
    metrics, file = resolved_config(run_dir / "config.yaml"), run_dir / "metrics.csv"
    last = metrics.get("trainer", {}).get("max_steps")
    rows = read_metrics(file) if file.is_file() else {}
    return last is None or any(step >= last for series in rows.values() for step, _ in series)


def page_of(run_dir: Path, evaluation: Path, introduction: str | None = None) -> Page:
    """Lays out a run directory and its evaluation; UserError where both are empty."""
    metrics_file, study = run_dir / "metrics.csv", run_dir / "black_point" / "summary.md"
    search = search_section(run_dir / "search") or search_section(run_dir)
    is_evaluated = is_about_results(evaluation)
    if not (metrics_file.is_file() or study.is_file() or is_evaluated) and search is None:
        raise UserError(
            f"run_dir={run_dir} holds no metrics.csv, sweep.json, nor a finished evaluation or "
            "search; name a run directory, or the output of an evaluation, a search or a sweep"
        )
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else {}
    notes = ["metrics.csv holds no rows yet."] if metrics_file.is_file() and not metrics else []
    evaluated: list[Part | None] = []
    if is_evaluated:
        try:
            evaluated = list(results_parts(read_results(evaluation)))
        except UserError as error:  # nothing of it is finished
            notes.append(str(error))
    elif study.is_file():
        notes.append(EARLIER)
    resolved = resolved_config(run_dir / "config.yaml")
    glance = at_a_glance(metrics, resolved.get("trainer", {}).get("max_steps"))
    preview = {"prompts": [], "num_images": 1} | resolved.get("preview", {})
    grids = previews(run_dir / "previews", preview["prompts"], preview["num_images"])
    return Page(
        f"blackpoint: {run_dir.name}",
        [
            introduction,
            Items("", notes),
            Facts("", subject(resolved, read_json(run_dir / "environment.json"))),
            *evaluated,
            Section("Previews during training", grids),
            Facts("", glance),
            search,
            Section(
                "The training run",
                run_figures(metrics, preview["prompts"]),
            ),
            Section(
                "How it was made",
                [
                    timings_table(read_json(run_dir / "timings.json")),
                    Facts("", environment(run_dir)),
                    Facts("Config, as resolved", shown_settings(resolved)),
                ],
            ),
        ],
    )


def results_parts(results: Results) -> list[Part | None]:
    """Lays out an evaluation or a sweep: pictures, tables, how bright the images are."""
    return [
        gallery([cell for cell in results.cells if cell.values]),
        *tables_of(results),
        *luminance_parts(results),
    ]


def timings_table(seconds: dict[str, float]) -> Table | None:
    """Shows the seconds of each step, and of all; None where there are none."""
    rows = [{"step": name, "seconds": value} for name, value in seconds.items()]
    together = {"step": "together", "seconds": sum(seconds.values())}
    return Table([*rows, together], {"step": "", "seconds": ".0f"}) if rows else None


def resolved_config(path: Path) -> dict[str, Any]:
    """Reads config.yaml as plain containers; {} where there is none."""
    if not path.is_file():
        return {}
    plain = read_yaml_file(path)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def environment(run_dir: Path) -> dict[str, str]:
    """Reads environment.json as flat lines of text."""
    lines: dict[str, str] = {}
    for name, value in read_json(run_dir / "environment.json").items():
        if isinstance(value, list):
            value = "; ".join(map(_one_line, value))
        elif isinstance(value, dict):
            value = _one_line(value)
        if value not in (None, ""):
            lines[name.replace("_", " ")] = str(value)
    return lines


def _one_line(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in values.items())
