"""Tables of results: every cell, settings over their seeds, who beats whom.

A table is text and numbers side by side, so that one thing is written as HTML, CSV and Markdown.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blackpoint.sampling.evaluation.summary import WORDS
from blackpoint.sampling.report.results import Cell, Key, Results, Value, is_seed, short, title_of
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.paired import count_outcomes, holm

MOST_IN_MATRIX = 24
Seeds = tuple[Any, ...]


@dataclass(frozen=True)
class TableCell:
    """What one place of a table shows."""

    text: str
    detail: str = ""
    """Interval and n, in small print."""
    number: float | None = None
    """What it is sorted by; its text if not set."""
    is_best: bool = False
    numbers: tuple[float, float, float, int] | None = None
    """Value, low, high, n, for CSV."""


@dataclass
class Table:
    """A named table; `name` is what its files are called."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[TableCell]]
    filters: list[int] = field(default_factory=list)
    """Columns by whose values rows can be chosen."""


@dataclass(frozen=True)
class Setting:
    """Cells that differ in seeds alone."""

    name: str
    cells: list[Cell]


def settings_of(results: Results) -> list[Setting]:
    """Groups finished cells by what they share beside seeds, in order."""
    found: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.values:
            found.setdefault(cell.setting, []).append(cell)
    return [Setting(name, cells) for name, cells in found.items()]


def metric_names(cells: Sequence[Cell]) -> list[str]:
    """Lists the metrics of all cells, each once."""
    return list(dict.fromkeys(name for cell in cells for name in cell.values))


def cells_table(results: Results) -> Table:
    """Shows every cell with all its metrics and its cost; the best of a column is marked."""
    keys = list(dict.fromkeys(key for cell in results.cells for key in cell.varied))
    has_arms = any(cell.arm for cell in results.cells)
    names = metric_names(results.cells)
    best = {name: _best([cell.values.get(name) for cell in results.cells]) for name in names}
    header = [*(["arm"] if has_arms else []), *(short(key) for key in keys)]
    settings = len(header)
    if not header:
        header, settings = ["cell"], 1
    header += [*(title_of(name, results.cells) for name in names), "NFE", "seconds"]
    header += ["peak GB", "state"]
    rows = []
    for cell in results.cells:
        row = [TableCell(cell.arm)] if has_arms else []
        row += [_plain(cell.varied.get(key)) for key in keys]
        row = row or [TableCell(cell.name)]
        for name in names:
            value = cell.values.get(name)
            row.append(_shown(value, value is not None and value is best[name]))
        row += [_number(cell.nfe), _number(cell.seconds), _number(cell.peak_gb)]
        row.append(TableCell(cell.state, cell.reason))
        rows.append(row)
    note = (
        "NFE and seconds are of one image, or of the search of one prompt. Best of a column: bold; "
        "whose interval meets the best's cannot be told from it by this table."
    )
    return Table("cells", "Every cell", note, header, rows, list(range(settings)))


def metrics_table(cell: Cell) -> Table:
    """Shows one cell, a line for each metric."""
    rows = [
        [TableCell(title_of(name, [cell])), _shown(value, False), TableCell(WORDS[value.better])]
        for name, value in cell.values.items()
    ]
    for name, number in (("NFE", cell.nfe), ("seconds", cell.seconds), ("peak GB", cell.peak_gb)):
        rows.append([TableCell(name), _number(number), TableCell("of one image, or one search")])
    rows[-1][2] = TableCell("of the process")
    return Table("metrics", "Metrics", "", ["metric", "value", ""], rows)


def seeds_table(results: Results, names: Sequence[str] = ()) -> Table | None:
    """Shows settings over their seeds, and each one's paired difference from the baseline.

    The interval is Student's t over seeds, so that it says how another training would come out.
    None where no setting was repeated. names: the metrics, all if empty.
    """
    settings = settings_of(results)
    if not any(len(setting.cells) > 1 for setting in settings):
        return None
    baseline = baseline_of(results, settings)
    names = names or metric_names(results.cells)
    header = ["setting", "seeds"]
    for name in names:
        title = title_of(name, results.cells)
        header += [title, f"{title}: minus {baseline.name}"]
    means = {
        (setting.name, name): over_seeds(setting.cells, name)
        for setting in settings
        for name in names
    }
    best = {name: _best([means[setting.name, name] for setting in settings]) for name in names}
    rows = []
    for setting in settings:
        row = [TableCell(setting.name), _plain(_num_repetitions(setting.cells))]
        for name in names:
            value = means[setting.name, name]
            row.append(_shown(value, value is not None and value is best[name]))
            change = None if setting is baseline else seed_difference(setting, baseline, name)
            row.append(signed_cell(change))
        rows.append(row)
    note = (
        f"Means over seeds, of trainings where these differ; differences from {baseline.name} are "
        "paired by seed. Intervals: 95 %, Student's t over seeds. A difference whose interval "
        "leaves out 0 is set in bold."
    )
    return Table("settings", "Settings over their seeds", note, header, rows, [0])


def baseline_of(results: Results, settings: Sequence[Setting]) -> Setting:
    """Returns the setting that others are compared with: the named one, or the first."""
    for setting in settings:
        names = {setting.name, *(each.arm for each in setting.cells)}
        names |= {each.name for each in setting.cells}
        if results.baseline in names:
            return setting
    return settings[0]


def seed_difference(setting: Setting, baseline: Setting, name: str) -> Estimate | None:
    """Estimates a metric's mean difference from the baseline, paired by seed; None for one seed."""
    prefix = _repeated([*setting.cells, *baseline.cells])
    ours, theirs = (_by_seed(each.cells, name, prefix) for each in (setting, baseline))
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
    """Returns what a plot shows of a setting: one cell's own interval, of more that over seeds."""
    own = [cell for cell in cells if name in cell.values]
    if len(own) == 1:
        return own[0].values[name].estimate
    found = over_seeds(own, name)
    return None if found is None else found.estimate


def win_matrix(results: Results, name: str) -> Table | None:
    """Shows, for each pair of settings, on how many prompts the row beats the column.

    A prompt's score is the mean over its images and seeds. p-values are of the exact test, with
    Holm's correction over all pairs. None where fewer than two settings have the metric.
    """
    scores = {
        setting.name: _by_prompt(setting, name)
        for setting in settings_of(results)
        if any(name in cell.paired for cell in setting.cells)
    }
    cut = f" The first {MOST_IN_MATRIX} of {len(scores)}." if len(scores) > MOST_IN_MATRIX else ""
    scores = dict(list(scores.items())[:MOST_IN_MATRIX])
    if len(scores) < 2:
        return None
    better = next(c.values[name].better for c in results.cells if name in c.values)
    sign = -1.0 if better == "lower" else 1.0
    outcomes, p_values = {}, {}
    for row in scores:
        for column in scores:
            shared = sorted(scores[row].keys() & scores[column].keys())
            if row == column or not shared:
                continue
            ours, theirs = (
                [sign * scores[each][prompt] for prompt in shared] for each in (row, column)
            )
            outcomes[row, column] = count_outcomes(ours, theirs)
            if (column, row) not in p_values:
                p_values[row, column] = outcomes[row, column].p_value
    adjusted = holm({f"{a}\0{b}": p for (a, b), p in p_values.items()})
    rows = []
    for row in scores:
        line = [TableCell(row)]
        for column in scores:
            found = outcomes.get((row, column))
            if found is None:
                line.append(TableCell(""))
                continue
            p_value = adjusted.get(f"{row}\0{column}", adjusted.get(f"{column}\0{row}", 1.0))
            text = f"{found.wins} : {found.losses}"
            share = found.win_share.value if found.wins + found.losses else 0.5
            wins = p_value < 0.05 and found.wins > found.losses
            line.append(TableCell(text, f"p {p_value:.2g}", share, wins))
        rows.append(line)
    note = (
        f"By {name}: prompts that the row wins and loses against the column, ties left out; p of "
        f"the exact test after Holm's correction over all pairs. Bold: the row wins (p < .05).{cut}"
    )
    slug = "".join(c if c.isalnum() else "_" for c in name)
    return Table(f"wins_{slug}", f"Who beats whom: {name}", note, ["", *scores], rows)


def plain_values(table: Table) -> tuple[list[str], list[list[str | float | None]]]:
    """Returns a table's header and lines with numbers as numbers, None where there is nothing.

    A number with an interval takes columns for low, high and n.
    """
    wide = [any(row[n].numbers for row in table.rows) for n in range(len(table.header))]
    header = []
    for name, is_wide in zip(table.header, wide, strict=True):
        header += [name, f"{name}: low", f"{name}: high", f"{name}: n"] if is_wide else [name]
    lines = []
    for row in table.rows:
        line: list[str | float | None] = []
        for cell, is_wide in zip(row, wide, strict=True):
            if is_wide:
                line += cell.numbers or (None, None, None, None)
            elif cell.number is not None and not cell.detail:
                line.append(cell.number)
            else:
                line.append(" ".join(filter(None, [cell.text, cell.detail])))
        lines.append(line)
    return header, lines


def to_csv(table: Table) -> str:
    """Writes `plain_values` as CSV, numbers to eight digits."""
    header, lines = plain_values(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        writer.writerow([f"{each:.8g}" if isinstance(each, float) else each for each in line])
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """Writes a table as Markdown, with its note."""

    def shown(cell: TableCell) -> str:
        text = f"**{cell.text}**" if cell.is_best and cell.text else cell.text
        return " ".join(filter(None, [text, cell.detail])).replace("|", "\\|")

    lines = [f"## {table.title}", "", table.note, "", f"| {' | '.join(table.header)} |"]
    lines.append("|" + "---|" * len(table.header))
    lines += [f"| {' | '.join(map(shown, row))} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _by_prompt(setting: Setting, name: str) -> dict[tuple[int, str], float]:
    found: dict[tuple[int, str], list[float]] = {}
    for cell in setting.cells:
        key: Key
        for key, value in cell.paired.get(name, {}).items():
            found.setdefault(key[:2], []).append(value)
    return {prompt: float(np.mean(values)) for prompt, values in found.items()}


def _repeated(cells: Sequence[Cell]) -> str:
    """Returns the beginning of the seeds that count as repetitions.

    Several trainings are the independent draws: seeds of evaluation within one are none.
    """
    return "train." if len({_seeds(cell, "train.") for cell in cells}) > 1 else ""


def _by_seed(cells: Sequence[Cell], name: str, prefix: str) -> dict[Seeds, float]:
    """Returns a metric of each repetition, the mean of its cells."""
    found: dict[Seeds, list[float]] = {}
    for cell in cells:
        value = cell.values[name].estimate.value if name in cell.values else math.nan
        if math.isfinite(value):
            found.setdefault(_seeds(cell, prefix), []).append(value)
    return {seeds: float(np.mean(values)) for seeds, values in found.items()}


def _num_repetitions(cells: Sequence[Cell]) -> int:
    return len({_seeds(cell, _repeated(cells)) for cell in cells})


def _seeds(cell: Cell, prefix: str) -> Seeds:
    return tuple(
        value for key, value in cell.varied.items() if is_seed(key) and key.startswith(prefix)
    )


def _best(values: Sequence[Value | None]) -> Value | None:
    own = [each for each in values if each is not None and math.isfinite(each.estimate.value)]
    if len(own) < 2 or not own[0].better:
        return None
    choose = min if own[0].better == "lower" else max
    return choose(own, key=lambda each: each.estimate.value)


def signed_cell(change: Estimate | None) -> TableCell:
    """Shows a difference; bold where its interval leaves out 0."""
    return _shown(None if change is None else Value(change), False, signed=True)


def _shown(value: Value | None, is_best: bool, signed: bool = False) -> TableCell:
    if value is None:
        return TableCell("")
    own = value.estimate
    text = f"{own.value:+.3g}" if signed else f"{own.value:.4g}"
    detail = ""
    if math.isfinite(own.low):
        mark = "+" if signed else ""
        detail = f"[{own.low:{mark}.3g}, {own.high:{mark}.3g}]"
        if signed:
            is_best = not own.low <= 0 <= own.high
    detail = f"{detail} n = {own.n}".strip()
    return TableCell(text, detail, own.value, is_best, (own.value, own.low, own.high, own.n))


def _plain(value: Any) -> TableCell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    number = float(value) if is_number else None
    return TableCell("" if value is None else str(value), number=number)


def _number(value: float) -> TableCell:
    return TableCell(f"{value:.3g}", number=value) if math.isfinite(value) else TableCell("")
