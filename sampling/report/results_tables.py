"""Tables of results: every cell, settings over their seeds, who beats whom."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np

from blackpoint.sampling.evaluation.summary import WORDS
from blackpoint.sampling.report.results import Cell, Key, Results, Value, is_seed, short, title_of
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.paired import count_outcomes, holm
from blackpoint.sampling.statistics.table import Marked, Table

MOST_IN_MATRIX = 24
VALUE, CHANGE, COST = ".4g n", "+.3g n", ".3g"
Seeds = tuple[Any, ...]


def settings_of(results: Results) -> dict[str, list[Cell]]:
    """Groups finished cells by their settings beside seeds, in order."""
    by_setting: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.values:
            by_setting.setdefault(cell.setting, []).append(cell)
    return by_setting


def metric_names(cells: Sequence[Cell]) -> list[str]:
    """Lists the metrics of all cells, each once."""
    return list(dict.fromkeys(name for cell in cells for name in cell.values))


def cells_table(results: Results) -> Table:
    """Shows every cell with all its metrics and its cost; the best of a column is marked."""
    keys = dict.fromkeys(key for cell in results.cells for key in cell.varied)
    settings = {"arm": "arm"} if any(cell.arm for cell in results.cells) else {}
    settings |= {key: short(key) for key in keys}
    settings = settings or {"cell": "cell"}
    names = metric_names(results.cells)
    best = {name: _best([cell.values.get(name) for cell in results.cells]) for name in names}
    rows = [
        {"arm": cell.arm, "cell": cell.name, **cell.varied}
        | {f"metric {name}": _marked(cell.values.get(name), best[name]) for name in names}
        | {"NFE": cell.nfe, "seconds": cell.seconds, "peak GB": cell.peak_gb}
        | {"state": Marked(cell.state, cell.reason)}
        for cell in results.cells
    ]
    note = (
        "NFE and seconds are of one image, or of the search of one prompt. Best of a column: bold; "
        "whose interval meets the best's cannot be told from it by this table."
    )
    columns = dict.fromkeys(settings, "") | {f"metric {name}": VALUE for name in names}
    columns |= {"NFE": COST, "seconds": COST, "peak GB": COST, "state": ""}
    columns = _without_repeats(columns, rows)
    headings = settings | {f"metric {name}": title_of(name, results.cells) for name in names}
    return Table(rows, columns, "Every cell", note, "cells", headings, list(settings))


def _without_repeats(
    columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Leaves out metrics whose numbers, of several rows, are those of a metric before."""
    kept: dict[str, str] = {}
    seen: list[list[Any]] = []
    for column, form in columns.items():
        numbers = [getattr(row.get(column), "value", None) for row in rows]
        is_metric = column.startswith("metric ") and len(rows) > 1 and any(numbers)
        if not (is_metric and numbers in seen):
            kept[column] = form
        seen += [numbers] if is_metric else []
    return kept


def metrics_table(cell: Cell) -> Table:
    """Shows one cell, a line for each metric."""
    rows: list[dict[str, Any]] = [
        {"metric": title_of(name, [cell]), "value": value.estimate, "": WORDS[value.better]}
        for name, value in cell.values.items()
    ]
    of_one = "of one image, or one search"
    rows += [
        {"metric": "NFE", "value": cell.nfe, "": of_one},
        {"metric": "seconds", "value": cell.seconds, "": of_one},
        {"metric": "peak GB", "value": cell.peak_gb, "": "of the process"},
    ]
    return Table(rows, {"metric": "", "value": VALUE, "": ""}, "Metrics", name="metrics")


def seeds_table(results: Results, names: Sequence[str] = ()) -> Table | None:
    """Shows settings over their seeds, and each one's paired difference from the baseline.

    The interval is Student's t over seeds, so that it says how another training would come out.
    None where no setting was repeated. names: the metrics, all if empty.
    """
    settings = settings_of(results)
    if not any(len(cells) > 1 for cells in settings.values()):
        return None
    baseline = baseline_of(results, settings)
    rows: list[dict[str, Any]] = [
        {"setting": setting, "seeds": len({_seeds(cell, _repeated(cells)) for cell in cells})}
        for setting, cells in settings.items()
    ]
    columns, headings = {"setting": "", "seeds": ""}, {}
    for name in names or metric_names(results.cells):
        value, change = f"metric {name}", f"change {name}"
        columns |= {value: VALUE, change: CHANGE}
        headings[value] = title_of(name, results.cells)
        headings[change] = f"{headings[value]}: minus {baseline}"
        means = [over_seeds(cells, name) for cells in settings.values()]
        best = _best(means)
        for row, (setting, cells), mean in zip(rows, settings.items(), means, strict=True):
            row[value] = _marked(mean, best)
            if setting != baseline:
                row[change] = marked_change(seed_difference(cells, settings[baseline], name))
    note = (
        f"Means over seeds, of trainings where these differ; differences from {baseline} are "
        "paired by seed. Intervals: 95 %, Student's t over seeds. A difference whose interval "
        "leaves out 0 is set in bold."
    )
    title = "Settings over their seeds"
    return Table(rows, columns, title, note, "settings", headings, ["setting"])


def baseline_of(results: Results, settings: Mapping[str, Sequence[Cell]]) -> str:
    """Names the setting that others are compared with: that of `results.baseline`, or the first."""
    for setting, cells in settings.items():
        names = {name for cell in cells for name in (cell.arm, cell.name)}
        if results.baseline in {setting, *names}:
            return setting
    return next(iter(settings))


def seed_difference(cells: Sequence[Cell], baseline: Sequence[Cell], name: str) -> Estimate | None:
    """Estimates a metric's mean difference from the baseline, paired by seed; None for one seed."""
    prefix = _repeated([*cells, *baseline])
    ours, theirs = (_by_seed(either, name, prefix) for either in (cells, baseline))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return statistics.paired_mean(differences) if len(differences) > 1 else None


def over_seeds(cells: Sequence[Cell], name: str) -> Value | None:
    """Returns a metric's mean over the repetitions of a setting, with Student's t interval.

    Of one repetition there is no interval. None where no cell has the metric.
    """
    numbers = list(_by_seed(cells, name, _repeated(cells)).values())
    if not numbers:
        return None
    better = next(cell.values[name].better for cell in cells if name in cell.values)
    if len(numbers) == 1:
        return Value(Estimate(numbers[0], math.nan, math.nan, 1), better)
    return Value(statistics.paired_mean(numbers), better)


def shown_estimate(cells: Sequence[Cell], name: str) -> Estimate | None:
    """Returns a setting's estimate for a plot: one cell's own, of several cells that over seeds."""
    measured = [cell for cell in cells if name in cell.values]
    if len(measured) == 1:
        return measured[0].values[name].estimate
    value = over_seeds(measured, name)
    return None if value is None else value.estimate


def win_matrix(results: Results, name: str) -> Table | None:
    """Shows, for each pair of settings, on how many prompts the row beats the column.

    A prompt's score is the mean over its images and seeds. p-values are of the exact test, with
    Holm's correction over all pairs. None where fewer than two settings have the metric.
    """
    scores = {
        setting: _by_prompt(cells, name)
        for setting, cells in settings_of(results).items()
        if any(name in cell.paired for cell in cells)
    }
    cut = f" The first {MOST_IN_MATRIX} of {len(scores)}." if len(scores) > MOST_IN_MATRIX else ""
    scores = dict(list(scores.items())[:MOST_IN_MATRIX])
    if len(scores) < 2:
        return None
    better = next(c.values[name].better for c in results.cells if name in c.values)
    sign = -1.0 if better == "lower" else 1.0
    outcomes = {}
    for row, column in permutations(scores, 2):
        shared = sorted(scores[row].keys() & scores[column].keys())
        ours, theirs = (
            [sign * scores[setting][key] for key in shared] for setting in (row, column)
        )
        if shared:
            outcomes[row, column] = count_outcomes(ours, theirs)
    pairs = [pair for pair in combinations(scores, 2) if pair in outcomes]
    adjusted = holm({"\0".join(pair): outcomes[pair].p_value for pair in pairs})
    rows: dict[str, dict[str, Any]] = {row: {"": row} for row in scores}
    for (row, column), test in outcomes.items():
        name_of_pair = f"{row}\0{column}" if (row, column) in pairs else f"{column}\0{row}"
        p_value = adjusted[name_of_pair]
        wins = p_value < 0.05 and test.wins > test.losses
        decided = test.wins + test.losses
        rate = f"{statistics.proportion(test.wins, decided):.1%}, " if decided else ""
        detail = f"{rate}p {p_value:.2g}"
        rows[row][column] = Marked(f"{test.wins} : {test.losses}", detail, wins)
    note = (
        f"By {name}: prompts that the row wins and loses against the column, ties left out; win "
        "rate with Wilson's 95 % interval; p of the exact test after Holm's correction over all "
        f"pairs. Bold: the row wins (p < .05).{cut}"
    )
    slug = "".join(c if c.isalnum() else "_" for c in name)
    columns = dict.fromkeys(["", *scores], "")
    return Table(list(rows.values()), columns, f"Who beats whom: {name}", note, f"wins_{slug}")


def _by_prompt(cells: Sequence[Cell], name: str) -> dict[tuple[int, str], float]:
    by_prompt: dict[tuple[int, str], list[float]] = {}
    for cell in cells:
        key: Key
        for key, value in cell.paired.get(name, {}).items():
            by_prompt.setdefault(key[:2], []).append(value)
    return {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}


def _repeated(cells: Sequence[Cell]) -> str:
    """Returns the beginning of the seeds that count as repetitions.

    Several trainings are the independent draws: seeds of evaluation within one are none.
    """
    return "train." if len({_seeds(cell, "train.") for cell in cells}) > 1 else ""


def _by_seed(cells: Sequence[Cell], name: str, prefix: str) -> dict[Seeds, float]:
    """Returns a metric of each repetition, the mean of its cells."""
    by_seeds: dict[Seeds, list[float]] = {}
    for cell in cells:
        value = cell.values[name].estimate.value if name in cell.values else math.nan
        if math.isfinite(value):
            by_seeds.setdefault(_seeds(cell, prefix), []).append(value)
    return {seeds: float(np.mean(values)) for seeds, values in by_seeds.items()}


def _seeds(cell: Cell, prefix: str) -> Seeds:
    return tuple(
        value for key, value in cell.varied.items() if is_seed(key) and key.startswith(prefix)
    )


def _best(values: Sequence[Value | None]) -> Value | None:
    finite = [
        value for value in values if value is not None and math.isfinite(value.estimate.value)
    ]
    if len(finite) < 2 or not finite[0].better:
        return None
    choose = min if finite[0].better == "lower" else max
    return choose(finite, key=lambda value: value.estimate.value)


def _marked(value: Value | None, best: Value | None) -> Marked | None:
    return None if value is None else Marked(value.estimate, is_bold=value is best)


def marked_change(change: Estimate | None) -> Marked | None:
    """Marks a difference whose interval leaves out 0."""
    return None if change is None else Marked(change, is_bold=change.low > 0 or change.high < 0)
