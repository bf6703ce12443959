"""The page of `blackpoint report` about an evaluation, a search or a sweep, here and at wandb."""

from pathlib import Path

from blackpoint.sampling.report.results import Results, read_results
from blackpoint.sampling.report.results_page import tables_of, write_results
from blackpoint.sampling.runtime.tracking import start_run
from blackpoint.scripts.verbs.report_config import ReportConfig


def write_results_of(config: ReportConfig) -> list[Path]:
    """Writes page and tables and returns their paths, the page first."""
    folder = Path(config.run_dir)
    results = read_results(folder)
    page = Path(config.output) if config.output else folder / "report.html"
    written = write_results(page, results, shared_settings(results))
    if config.wandb.enabled:
        send(config, results, page)
    return written


def shared_settings(results: Results) -> dict[str, str]:
    """Returns the settings that all cells have with one value."""
    shared = None
    for cell in results.cells:
        given = {key: str(value) for key, value in cell.settings.items()}
        shared = given if shared is None else {k: v for k, v in shared.items() if given.get(k) == v}
    return dict(sorted((shared or {}).items()))


def send(config: ReportConfig, results: Results, page: Path) -> None:
    """Sends every table, its numbers as numbers, and the page."""
    import wandb

    run = start_run(config.wandb, Path(config.run_dir), shared_settings(results))
    for table in tables_of(results):
        header, lines = table.values()
        run.log({table.name: wandb.Table([*header], lines, allow_mixed_types=True)})
    for cell in results.cells:
        for name, value in cell.values.items():
            key = f"{cell.name}/{name}" if len(results.cells) > 1 else name
            run.summary[key] = value.estimate.value
    run.log({"report": wandb.Html(page.read_text(encoding="utf-8"))})
    run.finish()
