"""One self-contained page about an evaluation, a search or a sweep, and its tables as files.

The page works offline: plots are inline SVG, pictures data URIs, its script a few lines. Tables
sort by a click on a head and filter by setting, pictures are enlarged by a click.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from blackpoint.sampling.report.candidate_tables import candidate_tables
from blackpoint.sampling.report.report import Gallery, page_template
from blackpoint.sampling.report.results import Cell, Key, Results
from blackpoint.sampling.report.results_plots import luminance_distributions, scaling_curves
from blackpoint.sampling.report.results_tables import (
    Table,
    cells_table,
    metric_names,
    metrics_table,
    seeds_table,
    settings_of,
    to_csv,
    to_markdown,
    win_matrix,
)
from blackpoint.sampling.whole_file import write_whole

TEMPLATE = Path(__file__).with_name("results.html.j2")
SCRIPT = Path(__file__).with_name("results.js")
TABLES = "report_tables"
NUM_COLUMNS, MOST_LINES = 8, 48
SIDES_PX = (512, 384, 256, 192, 128, 96)
PICTURE_BYTES = 8_000_000
BYTES_PER_PIXEL = 0.2  # of a JPEG at QUALITY
QUALITY = 85


def write_results(path: Path, results: Results, settings: Mapping[str, str]) -> list[Path]:
    """Writes the page, and CSV and Markdown of every table beside it; returns their paths."""
    tables = tables_of(results)
    written = [path]
    for table in tables:
        for suffix, text in ((".csv", to_csv(table)), (".md", to_markdown(table))):
            written.append(path.parent / TABLES / f"{table.name}{suffix}")
            write_whole(written[-1], text)
    write_whole(path, render(results, tables, settings))
    return written


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


def render(results: Results, tables: Sequence[Table], settings: Mapping[str, str]) -> str:
    """Renders the page as HTML text."""
    names = metric_names(results.cells)
    done = [cell for cell in results.cells if cell.values]
    return page_template(TEMPLATE).render(
        title=f"blackpoint: {results.title}",
        num_cells=len(results.cells),
        num_done=len(done),
        not_done=[cell for cell in results.cells if not cell.values],
        tables=[table for table in tables if not table.name.startswith("wins_")],
        matrices=[table for table in tables if table.name.startswith("wins_")],
        curves=scaling_curves(results, names),
        luminance=luminance_distributions(results),
        gallery=gallery(done),
        alarms=[(cell.name, cell.alarms) for cell in done if cell.alarms],
        has_searches=any(key.startswith("search.") for cell in done for key in cell.settings),
        notes=_notes(done),
        settings=settings,
        script=SCRIPT.read_text(encoding="utf-8"),
        folder=TABLES,
    )


def gallery(cells: Sequence[Cell]) -> Gallery | None:
    """Collects pictures of prompts and seeds that all cells have, one cell of each setting."""
    lines = {}
    for setting in settings_of(Results("", list(cells))):
        first = setting.cells[0]
        if first.pictures:
            lines[setting.name] = first
    if not lines:
        return None
    notes = []
    if len(lines) > MOST_LINES:
        notes.append(f"the first {MOST_LINES} of {len(lines)} settings")
        lines = dict(list(lines.items())[:MOST_LINES])
    shared = set(next(iter(lines.values())).pictures)
    others = [name for name, cell in lines.items() if not shared & set(cell.pictures)]
    if others:
        notes.append(f"without settings of other prompts: {', '.join(others)}")
    lines = {name: cell for name, cell in lines.items() if name not in others}
    keys = _spread(sorted(set.intersection(*(set(cell.pictures) for cell in lines.values()))))
    if not keys:
        return None
    side = _side(len(keys) * len(lines))
    first = next(iter(lines.values()))
    same_seeds = all(len({cell.pictures[key].seed for cell in lines.values()}) == 1 for key in keys)
    captions = [
        first.pictures[key].prompt
        + (f" \u00b7 seed {first.pictures[key].seed}" if same_seeds else "")
        for key in keys
    ]
    shown = [
        (name, [_embedded(cell.pictures[key].path, side) for key in keys])
        for name, cell in lines.items()
    ]
    return Gallery(captions, shown, "; ".join(notes))


def _spread(keys: Sequence[Key]) -> list[Key]:
    """Chooses prompts from the first to the last."""
    count = min(NUM_COLUMNS, len(keys))
    places = sorted({round(n * (len(keys) - 1) / max(1, count - 1)) for n in range(count)})
    return [keys[place] for place in places]


def _side(num_pictures: int) -> int:
    """Returns the largest side at which so many pictures keep the page light."""
    for side in SIDES_PX:
        if num_pictures * BYTES_PER_PIXEL * side**2 <= PICTURE_BYTES:
            return side
    return SIDES_PX[-1]


def _embedded(path: Path, side: int) -> str:
    """Returns a picture as data URI: as it is where it is small, else a JPEG no wider."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    content = io.BytesIO()
    if max(picture.size) <= min(side, SIDES_PX[-2]):
        picture.save(content, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(content, "JPEG", quality=QUALITY)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _notes(cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """Returns each note once, with the cells that it is of."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.notes:
            found.setdefault(note, []).append(cell.name)
    return list(found.items())
