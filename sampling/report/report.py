"""One self-contained HTML page about a run: its curves, previews and, after a study, the pictures,
distributions and numbers of its black point.

The page refers to nothing outside itself (plots are inline SVG, pictures data URIs), so it can be
mailed or archived. What a run lacks is left out of its page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.black_point import image_path
from blackpoint.sampling.evaluation.black_point_summary import Finding, table
from blackpoint.sampling.report import plots
from blackpoint.sampling.report.rows import DATA, Row
from blackpoint.sampling.report.search_page import SearchShown
from blackpoint.sampling.report.training_page import at_a_glance, embedded, run_figures
from blackpoint.sampling.report.training_series import Series

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLE = Path(__file__).with_name("page.css")
NUM_COLUMNS = 8
GALLERY_TITLES = {
    "black": "On a black background",
    "white": "On a white background",
    "open": "Background left open",
    "other": "Grays, and background left open",
}


@dataclass(frozen=True)
class Control:
    """Rows that were made elsewhere and are shown beside the run's own, with the command that makes
    them."""

    name: str
    findings: Sequence[Finding]
    command: str
    rows: Sequence[Row] = ()
    images: Path | None = None


@dataclass
class ReportContent:
    """What a page shows; empty parts are left out."""

    title: str
    introduction: str = ""
    rows: Sequence[Row] = ()
    findings: Sequence[Finding] = ()
    checkpoints: Sequence[str] = ()
    images: Path | None = None
    """Folder of the study, in which images/ lies."""
    guidance_scale: float = 3.0
    """The guidance that pictures and distributions of black and white captions are shown at."""
    control: Control | None = None
    metrics: Series = field(default_factory=dict)
    prompts: Sequence[str] = ()
    """Prompts of the previews."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    search: SearchShown | None = None
    previews: Sequence[tuple[str, Path]] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    timings: Sequence[tuple[str, float]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures of one cell: a column for each prompt and seed, a line for each checkpoint."""

    title: str
    settings: str
    captions: list[str]
    lines: list[tuple[str, list[str]]]


def write_report(path: Path, content: ReportContent) -> Path:
    """Writes the page and returns its path; the file is whole or as it was before."""
    write_whole(path, render(content))
    return path


def render(content: ReportContent) -> str:
    """Renders the page as HTML text."""
    template = page_template(TEMPLATE)
    findings = list(content.findings)
    if content.control is not None:
        findings += content.control.findings
    header, lines = table(findings) if findings else ([], [])
    return template.render(
        content=content,
        glance=at_a_glance(content.metrics, content.max_steps),
        figures=figures(content),
        run_figures=run_figures(content.metrics, content.prompts),
        galleries=galleries(content),
        header=header,
        lines=[[line[0], *(_cell(text) for text in line[1:])] for line in lines],
        previews=[(label, embedded(path)) for label, path in content.previews],
        total_s=sum(seconds for _, seconds in content.timings),
    )


def page_template(path: Path) -> Template:
    """Reads a page's template, which has the style of all pages as `style`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["style"] = STYLE.read_text(encoding="utf-8")
    return environment.from_string(path.read_text(encoding="utf-8"))


def figures(content: ReportContent) -> list[tuple[str, str, str]]:
    """Draws the plots of a study as (title, caption, SVG)."""
    drawn = []
    extra = list(content.control.rows) if content.control is not None else []
    rows = [*content.rows, *extra]
    names = [*content.checkpoints, *dict.fromkeys(row.checkpoint for row in extra)]
    real = [row for row in rows if row.checkpoint == DATA]
    for group, text in (
        ("open", "captions that leave the background open, guidance off"),
        ("black", 'captions that say "on a black background"'),
        ("white", 'captions that say "on a white background"'),
    ):
        panels = {"real images": real} if group == "open" and real else {}
        for name in names:
            own = [row for row in rows if row.checkpoint == name and row.group == group]
            scales = sorted({row.guidance_scale for row in own})
            if not scales:
                continue
            scale = _shown(scales, content.guidance_scale)
            panels[name] = [row for row in own if row.guidance_scale == scale]
            if group != "open":
                text = text.split(",")[0] + f", guidance {scale:g}"
        if any(key != "real images" for key in panels):
            svg = plots.luminance_histograms(panels, names)
            drawn.append((f"Border luminance: {text}", "", svg))
    if any(row.group in ("black", "white") for row in rows):
        caption = (
            "Bars: 95 % bootstrap intervals of the mean. Gray lines: what the captions ask for."
        )
        drawn.append(
            (
                "Black and white at every guidance scale",
                caption,
                plots.border_by_guidance(rows, names),
            )
        )
    return drawn


def galleries(content: ReportContent) -> list[Gallery]:
    """Collects the kept pictures: for each group of captions, the same prompts and seeds for every
    checkpoint."""
    if content.images is None:
        return []
    sources = {name: (content.images, content.rows) for name in content.checkpoints}
    control = content.control
    if control is not None and control.images is not None:
        sources[control.name] = (control.images, control.rows)
    found = []
    for group, title in GALLERY_TITLES.items():
        first = [
            row
            for row in content.rows
            if row.group == group and row.checkpoint in content.checkpoints
        ]
        scales = sorted({row.guidance_scale for row in first})
        if not scales:
            continue
        scale = _shown(scales, content.guidance_scale)
        reference = sorted(
            {
                (row.index, row.prompt, row.seed, row.cell)
                for row in first
                if row.guidance_scale == scale
            }
        )[:NUM_COLUMNS]
        lines = []
        for name, (images, rows) in sources.items():
            made = {
                (row.index, row.prompt, row.seed, row.cell)
                for row in rows
                if row.checkpoint == name
            }
            paths = [image_path(images, name, key[3], key[0]) for key in reference]
            if all(key in made for key in reference) and all(path.is_file() for path in paths):
                lines.append((name, [embedded(path) for path in paths]))
        if lines:
            guidance = "guidance off" if scale == 1 else f"guidance {scale:g}"
            captions = [f"{prompt} \u00b7 seed {seed}" for _, prompt, seed, _ in reference]
            found.append(Gallery(title, guidance, captions, lines))
    return found


def _shown(scales: Sequence[float], preferred: float) -> float:
    return preferred if preferred in scales else scales[0]


def _cell(text: str) -> tuple[str, str]:
    """Splits `value [low, high] n=N` into the value and the rest."""
    value, _, rest = text.partition(" [")
    return value, f"[{rest}" if rest else ""
