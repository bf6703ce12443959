"""What a run directory and its study hold, gathered for the page of `blackpoint report`."""

import json
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.evaluation.black_point_summary import summary
from blackpoint.sampling.report.report import Control, ReportContent, write_report
from blackpoint.sampling.report.rows import DATA, Row, read_rows
from blackpoint.sampling.report.search_page import read_search
from blackpoint.sampling.report.training_page import chosen_grids, shown_settings
from blackpoint.scripts.verbs.report import ReportConfig
from blackpoint.train.records.metrics_file import read_metrics

CONTROL = "control"
CONTROL_COMMAND = "blackpoint demo control=true"
INTRODUCTION = (
    "Stable Diffusion cannot paint true black or true white. Its noise schedule never reaches pure "
    "noise: at the last training step the image's mean still shines through, and sampling then "
    "starts from noise without it, so every image is drawn towards a middle gray.\n\n"
    "The cure (Lin et al. 2023): rescale the schedule to zero terminal SNR, train with "
    "v-prediction, start sampling at the last timestep, rescale the guidance. Below, the same "
    "prompts and seeds before and after."
)


def write(config: ReportConfig) -> Path:
    """Writes the page and returns its path."""
    run_dir = Path(config.run_dir)
    study = Path(config.evaluation) if config.evaluation else run_dir / "black_point"
    content = collect(run_dir, study, Path(config.committed_rows))
    return write_report(Path(config.output) if config.output else run_dir / "report.html", content)


def collect(run_dir: Path, study: Path, committed: Path) -> ReportContent:
    """Gathers what the run directory and its study hold."""
    metrics, rows_file = run_dir / "metrics.csv", study / "rows.csv.gz"
    search = read_search(run_dir / "search") or read_search(run_dir)
    if not metrics.is_file() and not rows_file.is_file() and search is None:
        raise UserError(
            f"run_dir={run_dir} holds no metrics.csv, black_point/rows.csv.gz, sweep.json, nor a "
            "finished evaluation or search; name a run directory, or the output of an evaluation, "
            "a search or a sweep"
        )
    content = ReportContent(title=f"blackpoint: {run_dir.name}", search=search)
    if metrics.is_file():
        content.metrics = read_metrics(metrics)
        if not content.metrics:
            content.notes = ["metrics.csv holds no rows yet."]
    if rows_file.is_file():
        content.introduction = INTRODUCTION
        content.rows = read_rows(rows_file)
        content.images = study
        content.checkpoints = study_checkpoints(study, content.rows)
        record = _read_json(study / "study.json")
        content.notes = [*content.notes, *record.get("notes", [])]
        content.guidance_scale = record.get("read_guidance_scale", content.guidance_scale)
        content.findings = summary(content.rows, content.checkpoints, content.guidance_scale)
        if CONTROL not in content.checkpoints and committed.is_file():
            content.control = committed_control(committed)
    content.previews = chosen_grids(run_dir / "previews")
    resolved = resolved_config(run_dir / "config.yaml")
    content.config = shown_settings(resolved)
    content.prompts = resolved.get("preview", {}).get("prompts", [])
    content.max_steps = resolved.get("trainer", {}).get("max_steps")
    content.environment = environment(run_dir)
    content.timings = list(_read_json(run_dir / "timings.json").items())
    return content


def study_checkpoints(study: Path, rows: list[Row]) -> list[str]:
    """Lists the checkpoints of a study in the order in which they were given."""
    present = {row.checkpoint for row in rows} - {DATA}
    named = _read_json(study / "study.json").get("checkpoints", {})
    return [name for name in named if name in present] or sorted(present)


def committed_control(path: Path) -> Control | None:
    """Reads the control's rows from those kept in the repository."""
    rows = [row for row in read_rows(path) if row.checkpoint in (CONTROL, DATA)]
    own = [row for row in rows if row.checkpoint == CONTROL]
    if not own:
        return None
    findings = [found for found in summary(rows, [CONTROL]) if found.checkpoint == CONTROL]
    has_images = (path.parent / "images" / CONTROL).is_dir()
    return Control(CONTROL, findings, CONTROL_COMMAND, own, path.parent if has_images else None)


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
