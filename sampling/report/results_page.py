"""One page about an evaluation, a search or a sweep, and its tables as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.candidate_tables import candidate_tables
from blackpoint.sampling.report.page import (
    Choice,
    Facts,
    Figure,
    Gallery,
    Items,
    Page,
    Section,
    embedded,
    spread,
)
from blackpoint.sampling.report.results import Cell, Results
from blackpoint.sampling.report.results_plots import luminance_parts, scaling_curves
from blackpoint.sampling.report.results_tables import (
    cells_table,
    metric_names,
    metrics_table,
    seeds_table,
    settings_of,
    win_matrix,
)
from blackpoint.sampling.report.search_page import search_gallery
from blackpoint.sampling.statistics.table import Table

TABLES = "report_tables"
NUM_COLUMNS, MOST_LINES = 8, 48
SIDES_PX = (512, 384, 256, 192, 128, 96)
PICTURE_BYTES = 8_000_000
BYTES_PER_PIXEL = 0.2  # of a JPEG


def write_results(path: Path, results: Results, settings: Mapping[str, str]) -> list[Path]:
    """Writes the page, and CSV and Markdown of every table beside it; returns their paths."""
    tables = tables_of(results)
    files = {path.parent / TABLES / name: text for name, text in table_files(tables).items()}
    files[path] = page_of(results, tables, settings).html()
    for file, content in files.items():
        write_whole(file, content)
    return [path, *list(files)[:-1]]


def table_files(tables: Sequence[Table]) -> dict[str, str]:
    """Returns name and content of every table's files."""
    files = {}
    for table in tables:
        files[f"{table.name}.csv"] = table.csv()
        files[f"{table.name}.md"] = Page("", [table]).markdown()
    return files


def tables_of(results: Results, of_settings: Sequence[str] = ()) -> list[Table]:
    """Returns the tables of the page, in order: settings, cells, a matrix for each score.

    of_settings: the metrics that settings are shown with; all if empty. Of a single cell there is
    one table.
    """
    several = {cell.name: cell.candidates for cell in results.cells if cell.candidates is not None}
    if len(results.cells) == 1:
        return [metrics_table(results.cells[0]), *candidate_tables(several)]
    tables = [seeds_table(results, of_settings), cells_table(results), *candidate_tables(several)]
    names = [n for n in metric_names(results.cells) if any(n in c.paired for c in results.cells)]
    tables += [win_matrix(results, name) for name in names]
    return [table for table in tables if table is not None]


def page_of(results: Results, tables: Sequence[Table], settings: Mapping[str, str]) -> Page:
    """Lays the page out."""
    done = [cell for cell in results.cells if cell.values]
    matrices = [table for table in tables if table.name.startswith("wins_")]
    alarms = [f"{cell.name}: {line}" for cell in done for line in cell.alarms]
    has_searches = any(key.startswith("search.") for cell in done for key in cell.settings)
    untested = dict.fromkeys(line for cell in done for line in cell.untested)
    silent = None
    if has_searches and not alarms:
        silent = "No search has raised the hacking alarm."
        if untested:
            silent = f"The hacking alarm could not tell: {'; '.join(untested)}."
    not_done = [
        ": ".join(filter(None, [cell.name, cell.state, cell.reason]))
        for cell in results.cells
        if not cell.values
    ]
    curves = scaling_curves(results, metric_names(results.cells))
    return Page(
        f"blackpoint: {results.title}",
        [
            f"{len(done)} of {len(results.cells)} "
            f"{'cell is' if len(results.cells) == 1 else 'cells are'} done. Numbers stand with "
            "their 95 % interval and n. The tables lie beside this page as CSV and Markdown, in "
            f"`{TABLES}/`.",
            Items("Not done", not_done),
            Items(
                "Hacking alarms",
                alarms,
                "The searched score rose while what nobody searched for fell, from the plain "
                "images to the winners.",
            ),
            silent,
            *(table for table in tables if table not in matrices),
            Section("What more compute buys", [Figure(title, svg) for title, svg in curves]),
            Section("Who beats whom", [Choice("score", matrices)]),
            search_gallery(done[0].search, "Before and after the search")
            if len(done) == 1 and done[0].search
            else gallery(done),
            *luminance_parts(
                results, "Images whose prompts leave luminance open; all images, where none does."
            ),
            Items("Notes", _notes(done)),
            Facts("Arms: what sets them apart", arms(results, settings)),
            Facts("Settings that all cells share", settings),
        ],
    )


def arms(results: Results, shared: Mapping[str, str]) -> dict[str, str]:
    """Says what the name of each arm stands for: its settings that not all cells share."""
    by_arm: dict[str, dict[str, str]] = {}
    for cell in results.cells:
        own = {k: str(v) for k, v in cell.settings.items() if k not in {*shared, *cell.varied}}
        before = by_arm.setdefault(cell.arm, own)
        by_arm[cell.arm] = {k: v for k, v in before.items() if own.get(k) == v}
    named = {arm: ", ".join(f"{k}={v}" for k, v in own.items()) for arm, own in by_arm.items()}
    return {arm: text for arm, text in named.items() if arm and text}


def gallery(cells: Sequence[Cell]) -> Gallery | None:
    """Collects images of prompts and seeds that all cells have, one cell of each setting."""
    settings = settings_of(Results("", list(cells)))
    lines = {name: first for name, (first, *_) in settings.items() if first.pictures}
    if not lines:
        return None
    notes = [f"the first {MOST_LINES} of {len(lines)} settings"] if len(lines) > MOST_LINES else []
    lines = dict(list(lines.items())[:MOST_LINES])
    first = next(iter(lines.values()))
    others = [n for n, cell in lines.items() if not first.pictures.keys() & cell.pictures.keys()]
    if others:
        notes.append(f"without settings of other prompts: {', '.join(others)}")
    lines = {name: cell for name, cell in lines.items() if name not in others}
    shared = set.intersection(*(set(cell.pictures) for cell in lines.values()))
    keys = spread(sorted(shared), NUM_COLUMNS)
    if not keys:
        return None
    num_pictures = len(keys) * len(lines)
    most_px = PICTURE_BYTES / BYTES_PER_PIXEL / num_pictures
    side = next((side for side in SIDES_PX if side**2 <= most_px), SIDES_PX[-1])
    same_seeds = all(len({cell.pictures[key].seed for cell in lines.values()}) == 1 for key in keys)
    captions = [
        key[1] + (f" \u00b7 seed {seed}" if same_seeds and seed is not None else "")
        for key, seed in ((key, first.pictures[key].seed) for key in keys)
    ]
    shown = [
        (name, [embedded(cell.pictures[k].path, side, PICTURE_BYTES / num_pictures) for k in keys])
        for name, cell in lines.items()
    ]
    note = (
        "Each column is one prompt and one image of it; a click enlarges. Prompts are not chosen: "
        "from the first to the last"
    )
    if any(cell.search for cell in lines.values()):
        notes.insert(0, "images of searches are the winners, which their scores have chosen")
    note = "; ".join([note, *notes]) + "."
    return Gallery("The same prompts and seeds", shown, note, captions, before="line")


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Returns each note once, with the cells that it is of."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.notes:
            names.setdefault(note, []).append(cell.name)
    return [
        f"{note} ({len(of)} {'cell' if len(of) == 1 else 'cells'}: {', '.join(of[:4])}"
        + (", ...)" if len(of) > 4 else ")")
        for note, of in names.items()
    ]
