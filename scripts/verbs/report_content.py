"""What a run directory and its evaluation hold, gathered for the page of `blackpoint report`."""

import json
from pathlib import Path
from typing import Any

from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.errors import UserError
from blackpoint.sampling.report.report import ReportContent, write_report
from blackpoint.sampling.report.results import read_results
from blackpoint.sampling.report.results_page import gallery, tables_of
from blackpoint.sampling.report.results_plots import luminance_distributions
from blackpoint.sampling.report.search_page import read_search
from blackpoint.sampling.report.training_page import chosen_grids, shown_settings
from blackpoint.scripts.verbs.report import ReportConfig, is_about_results
from blackpoint.train.records.metrics_file import read_metrics

EARLIER = (
    "black_point/ holds what an earlier version sampled, with its numbers in summary.md; "
    "`blackpoint evaluate configs/black_point.yaml` measures the same now."
)


def write(config: ReportConfig, introduction: str = "") -> Path:
    """Writes the page and returns its path."""
    run_dir = Path(config.run_dir)
    evaluation = Path(config.evaluation) if config.evaluation else run_dir / "evaluation"
    content = collect(run_dir, evaluation)
    content.introduction = introduction
    return write_report(Path(config.output) if config.output else run_dir / "report.html", content)


def collect(run_dir: Path, evaluation: Path) -> ReportContent:
    """Gathers what the run directory holds, and the evaluation or sweep of it."""
    metrics, study = run_dir / "metrics.csv", run_dir / "black_point" / "summary.md"
    search = read_search(run_dir / "search") or read_search(run_dir)
    is_evaluated = is_about_results(evaluation)
    if not (metrics.is_file() or study.is_file() or is_evaluated) and search is None:
        raise UserError(
            f"run_dir={run_dir} holds no metrics.csv, sweep.json, nor a finished evaluation or "
            "search; name a run directory, or the output of an evaluation, a search or a sweep"
        )
    content = ReportContent(title=f"blackpoint: {run_dir.name}", search=search)
    if metrics.is_file():
        content.metrics = read_metrics(metrics)
        if not content.metrics:
            content.notes = ["metrics.csv holds no rows yet."]
    if is_evaluated:
        _add_results(content, evaluation)
    elif study.is_file():
        content.notes = [*content.notes, EARLIER]
    content.previews = chosen_grids(run_dir / "previews")
    resolved = resolved_config(run_dir / "config.yaml")
    content.config = shown_settings(resolved)
    content.prompts = resolved.get("preview", {}).get("prompts", [])
    content.max_steps = resolved.get("trainer", {}).get("max_steps")
    content.environment = environment(run_dir)
    content.timings = list(_read_json(run_dir / "timings.json").items())
    return content


def _add_results(content: ReportContent, evaluation: Path) -> None:
    """Adds what an evaluation or a sweep found; a note where nothing of it is finished."""
    try:
        results = read_results(evaluation)
    except UserError as error:
        content.notes = [*content.notes, str(error)]
        return
    content.tables = tables_of(results)
    content.luminance = luminance_distributions(results)
    content.gallery = gallery([cell for cell in results.cells if cell.values])


def resolved_config(path: Path) -> dict[str, Any]:
    """Reads config.yaml as plain containers; {} where there is none."""
    if not path.is_file():
        return {}
    plain = read_yaml_file(path)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def environment(run_dir: Path) -> dict[str, str]:
    """Reads environment.json as flat lines of text."""
    lines: dict[str, str] = {}
    for name, value in _read_json(run_dir / "environment.json").items():
        if isinstance(value, list):
            value = "; ".join(map(_one_line, value))
        elif isinstance(value, dict):
            value = _one_line(value)
        if value not in (None, ""):
            lines[name.replace("_", " ")] = str(value)
    return lines


def _one_line(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in values.items())


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
