"""The page of `blackpoint report` about an evaluation, a search or a sweep, here and at wandb."""

from pathlib import Path
from typing import Any

from blackpoint.sampling.report.results import Cell, Results, read_results
from blackpoint.sampling.report.results_page import tables_of, write_results
from blackpoint.sampling.runtime.tracking import CHECKPOINT_KEYS, start_run, trained_by
from blackpoint.scripts.verbs.report_config import ReportConfig


def write_results_of(config: ReportConfig) -> list[Path]:
    """Writes page and tables and returns their paths, the page first."""
    folder = config.folder
    results = read_results(folder)
    page = Path(config.output) if config.output else folder / "report.html"
    shown = {key: str(value) for key, value in shared_settings(results).items()}
    written = write_results(page, results, shown)
    if config.wandb.enabled:
        send(config, results, page)
    return written


def shared_settings(results: Results) -> dict[str, Any]:
    """Returns the settings that all cells have with one value."""
    first, *others = [cell.settings for cell in results.cells] or [{}]
    missing = object()
    shared = {k: v for k, v in first.items() if all(o.get(k, missing) == v for o in others)}
    return dict(sorted(shared.items()))


def send(config: ReportConfig, results: Results, page: Path) -> None:
    """Sends every table, its numbers as numbers, the trainings of the cells, and the page."""
    import wandb

    run = start_run(config.wandb, config.folder, shared_settings(results))
    for table in tables_of(results):
        header, lines = table.values()
        run.log({table.name: wandb.Table([*header], lines, allow_mixed_types=True)})
    origins = {cell.name: origin_of(cell) for cell in results.cells}
    if rows := [[name, *origin.values()] for name, origin in origins.items() if origin]:
        run.log({"trainings": wandb.Table(["cell", "run_id", "project", "run_dir"], rows)})
    for cell in results.cells:
        for name, value in cell.values.items():
            key = f"{cell.name}/{name}" if len(results.cells) > 1 else name
            run.summary[key] = value.estimate.value
    run.log({"report": wandb.Html(page.read_text(encoding="utf-8"))})
    run.finish()


def origin_of(cell: Cell) -> dict[str, str]:
    """Returns the training whose checkpoint a cell evaluates or searches; else {}."""
    places = (cell.settings.get(key) for key in CHECKPOINT_KEYS)
    return next((origin for place in places if (origin := trained_by(place))), {})
