"""Results of evaluations, searches and cells of a sweep, in one form.

A cell is one setting: its metrics with intervals, its scores image by image (for what is paired),
its images by prompt and seed, its cost. Read from the files that the verbs leave; a cell that is
not finished, or of another version, is kept with the reason.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import inside
from blackpoint.data.files.plain import number, read_array, read_json, read_lines
from blackpoint.sampling.evaluation.metric import Better, Metric, Row
from blackpoint.sampling.evaluation.metrics.brightness import ERROR, LUMINANCE
from blackpoint.sampling.evaluation.rows import IMAGES, REFERENCE, SETTINGS, read_images
from blackpoint.sampling.evaluation.summary import read_summary, title_at_n
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.candidate_scores import Candidates, scores_by_prompt
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.verifiers.load import KINDS

SWEEP, CELL = "sweep.json", "cell.json"
WINNERS, SEARCH_SETTINGS, LEDGER, HACKING = (
    "winners.jsonl",
    "search.json",
    "ledger.json",
    "hacking.json",
)
CANDIDATES, BEST_OF_N = "candidates.jsonl", "random"
"""Rows of a search, and the algorithm whose candidates are independent images."""
FOLDERS = {"evaluate": "evaluation", "search": "search"}
"""Section of a sweep -> its folder in a cell's."""
STALE = "stale"
VERSION = 1
Key = tuple[int, str, int]
"""Index and text of the prompt, and the image of it: cells with other prompts share none."""
EVALUATE_AND_SEARCH = "verb"
"""Key that tells apart the two lines of a cell that evaluates and searches."""


@dataclass(frozen=True)
class Value:
    """One number of a cell."""

    estimate: Estimate
    better: Better = ""


@dataclass(frozen=True)
class Picture:
    """An image that a cell kept."""

    seed: int | None
    path: Path


@dataclass
class Cell:
    """One setting and its results."""

    name: str
    arm: str = ""
    varied: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    state: str = "done"
    reason: str = ""
    values: dict[str, Value] = field(default_factory=dict)
    """Metric -> number, in order."""
    paired: dict[str, dict[Key, float]] = field(default_factory=dict)
    """Metric, as in `values` -> score of each image; higher or lower is better as there."""
    pictures: dict[Key, Picture] = field(default_factory=dict)
    luminance: list[float] = field(default_factory=list)
    """Of images whose prompts leave it open; of all, where none does."""
    candidates: Candidates | None = None
    """Several images of each prompt by every score, where they are independent."""
    alarms: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    """Why the hacking alarm of a search could not tell."""
    notes: list[str] = field(default_factory=list)
    search: Path | None = None
    """Folder of a search, whose pictures are its winners."""
    nfe: float = math.nan
    """UNet evaluations of an image, or of a prompt's search."""
    seconds: float = math.nan
    """Seconds of an image, or of a prompt's search."""
    peak_gb: float = math.nan

    @property
    def setting(self) -> str:
        """The name without seeds: cells that differ only in seeds repeat one setting."""
        varied = [f"{short(k)} {v}" for k, v in self.varied.items() if not is_seed(k)]
        return ", ".join(filter(None, [self.arm, *varied])) or self.name


@dataclass(frozen=True)
class Results:
    """The cells of a sweep, or the one of an evaluation or search."""

    title: str
    cells: list[Cell]
    baseline: str | None = None
    reference_luminance: list[float] = field(default_factory=list)


def read_results(folder: Path) -> Results:
    """Reads a sweep, an evaluation or a search; raises UserError where there is none of them."""
    if (folder / SWEEP).is_file():
        return _read_sweep(folder)
    cell = Cell(folder.name)
    reference = _fill(cell, folder)
    if not cell.values:
        raise UserError(
            f"run_dir={folder} holds no finished evaluation or search"
            + (f" ({cell.state}: {cell.reason})" if cell.reason else "")
            + "; run its command again, which continues it"
        )
    return Results(folder.name, [cell], None, reference)


def short(key: str) -> str:
    """Returns the last word of a dotted key."""
    return key.rpartition(".")[2].replace("_", " ")


def title_of(name: str, cells: Sequence[Cell]) -> str:
    """Returns the heading of a metric of these cells."""
    return title_at_n(name, [cell.values[name].estimate.n for cell in cells if name in cell.values])


def is_seed(key: str) -> bool:
    """Whether a key of the grid only repeats what it repeats."""
    return key.rpartition(".")[2] == "seed"


def _read_sweep(folder: Path) -> Results:
    content = read_json(folder / SWEEP)
    if content.get("version") != VERSION:
        raise UserError(
            f"{folder / SWEEP} was written by another version ({content.get('version')}); report "
            "it with that one, or run the sweep again, which leaves finished cells alone"
        )
    cells, reference = [], list[float]()
    for row in content["cells"]:
        for cell, path in _cells_of(folder, row):
            if cell.state in ("done", STALE):
                reference = _fill(cell, path) or reference
            cells.append(cell)
    if not any(row.get(section) for row in content["cells"] for section in FOLDERS):
        training = folder / "trainings" / content["cells"][0]["training"]
        raise UserError(
            f"run_dir={folder} is a sweep of trainings alone; run_dir={training} shows one of them"
        )
    if not any(cell.values for cell in cells):
        raise UserError(f"run_dir={folder}: no cell of the sweep is done; run it first")
    return Results(folder.name, cells, content.get("baseline"), reference)


def _cells_of(folder: Path, row: Mapping[str, Any]) -> Iterator[tuple[Cell, Path]]:
    """Yields a cell of a sweep with the folder of its verb; two where it evaluates and searches."""
    path = folder / row["folder"]
    record = read_json(path / CELL)
    state, reason = record.get("state", "not run"), record.get("reason", "")
    if state == "started":
        state = "stopped, or under way"
    elif state == "done" and record.get("digest") not in (
        "",
        row.get("digest", record.get("digest")),
    ):
        state, reason = STALE, "measured with other settings than now; run the sweep again"
    verbs = [section for section in FOLDERS if row.get(section)]
    for verb in verbs or ["evaluate"]:
        settings = {
            f"{section}.{key}": value
            for section in ("train", verb)
            for key, value in row.get(section, {}).items()
        }
        name, varied = row["name"], row["varied"]
        if len(verbs) > 1:
            name, varied = f"{name} {verb}", {**varied, EVALUATE_AND_SEARCH: verb}
        yield Cell(name, row["arm"], varied, settings, state, reason), path / FOLDERS[verb]


def _fill(cell: Cell, folder: Path) -> list[float]:
    """Reads an evaluation or a search into the cell; returns the references' luminance."""
    reference = list[float]()
    try:
        if (folder / IMAGES).is_file():
            reference = _read_evaluation(cell, folder)
        elif (folder / WINNERS).is_file():
            _read_search(cell, folder)
    except (UserError, LookupError, TypeError, ValueError) as error:
        cell.state, cell.reason = "not readable", f"{type(error).__name__}: {error}"
    return reference


def _read_evaluation(cell: Cell, folder: Path) -> list[float]:
    summary = read_summary(folder)
    if summary is None:
        cell.state = "not finished"
        return []
    rows = read_images(folder)
    for metric in summary.metrics:
        title = metric.name + (f", {metric.group}" if metric.group else "")
        cell.values[title] = Value(metric.estimate, metric.better)
        if values := _paired(metric, rows):
            cell.paired[title] = values
    cell.pictures = {
        (row["prompt_index"], row["prompt"], row["image"]): Picture(row["seed"], path)
        for row in rows
        if row["file"] and (path := inside(folder, row["file"])) and path.is_file()
    }
    settings = read_json(folder / SETTINGS)
    names = [m.name for m in summary.metrics if m.name in rows[0] and not m.group]
    scores = scores_by_prompt(((row["prompt_index"], row["image"], row) for row in rows), names)
    cell.candidates = Candidates(scores, tuple(names)) if scores else None
    column = "border_luminance" if summary.where == "border" else "luminance"
    left_open = [row for row in rows if row["luminance_error"] is None]
    cell.luminance = [row[column] for row in (left_open or rows)]
    cell.notes = [*summary.notes, *(f"skipped {k}: {v}" for k, v in summary.skipped.items())]
    cell.nfe = summary.nfe / summary.num_images
    cell.seconds = summary.seconds / summary.num_images
    cell.peak_gb = summary.peak_gb or math.nan
    cell.settings = cell.settings or {f"evaluate.{k}": v for k, v in settings.items()}
    return list(read_json(folder / REFERENCE).get(summary.where, []))


def _read_search(cell: Cell, folder: Path) -> None:
    if not (folder / HACKING).is_file():
        cell.state = "not finished"
        return
    cell.search = folder
    rows = read_lines(folder / WINNERS)
    settings = read_json(folder / SEARCH_SETTINGS)
    for kind in ("held_out", "scores"):
        for name in rows[0][kind]:
            scores = {
                (row["prompt_index"], row["prompt"], 0): number(row[kind][name])
                for row in rows
                if math.isfinite(number(row[kind][name]))
            }
            if scores:
                searched = kind == "scores" and _decides(settings, name)
                title = f"{name} (searched)" if searched else name
                cell.values[title] = Value(statistics.mean_score(list(scores.values())), "higher")
                cell.paired[title] = scores
    for row in rows:
        path = inside(folder, row["image"])
        if path is not None and path.is_file():
            key = (row["prompt_index"], row["prompt"], 0)
            cell.pictures[key] = Picture(row["seed"], path)
    alarms = read_array(folder / HACKING)
    cell.alarms = [finding["line"] for alarm in alarms for finding in alarm["findings"]]
    cell.untested = [line for alarm in alarms for line in alarm.get("notes", [])]
    cell.nfe = sum(row["nfe"] for row in rows) / len(rows)
    ledger = read_json(folder / LEDGER)
    parts = (ledger.get(f"{name}_s", 0.0) for name in ("denoising", "decoding", "verifying"))
    cell.seconds = sum(parts) / len(rows)
    cell.candidates = _searched_candidates(folder, settings)
    cell.settings = cell.settings or {f"search.{k}": v for k, v in settings.items()}


def _decides(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a verifier has a part in a search's choices: one of weight 0 has none."""
    verifier = settings.get("verifiers", {}).get(name, {})
    return settings.get("ensemble") != "weighted_sum" or verifier.get("weight", 1.0) != 0


def _searched_candidates(folder: Path, settings: Mapping[str, Any]) -> Candidates | None:
    """Reads the candidates of a best-of-N search, which are independent; None of another."""
    path = folder / CANDIDATES
    if settings.get("algorithm") != BEST_OF_N or not path.is_file():
        return None
    rows = read_lines(path)
    verifiers = settings["verifiers"]
    kinds = {name: verifiers[name]["kind"] for name in rows[0]["scores"]}
    rows_of_prompts = ((row["prompt_index"], row["candidate"], row["scores"]) for row in rows)
    scores = scores_by_prompt(rows_of_prompts, list(kinds))
    qualities = tuple(name for name, kind in kinds.items() if KINDS[kind].needs == "image")
    return Candidates(scores, qualities) if scores else None


def _paired(metric: Metric, rows: Sequence[Row]) -> dict[Key, float]:
    """Returns the scores that a metric is the mean of; nothing for metrics of sets."""
    if metric.name == ERROR and not metric.group:
        column = "luminance_error"
    elif metric.name in rows[0] and not metric.group and metric.name != LUMINANCE:
        column = metric.name
    else:
        return {}
    return {
        (row["prompt_index"], row["prompt"], row["image"]): row[column]
        for row in rows
        if row[column] is not None and math.isfinite(row[column])
    }
