"""One self-contained HTML page about a run: its curves, previews, and what was evaluated of it.

The page refers to nothing outside itself (plots are inline SVG, pictures data URIs), so it can be
mailed or archived. What a run lacks is left out of its page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from blackpoint.sampling.report.results_tables import Table
from blackpoint.sampling.report.search_page import SearchShown
from blackpoint.sampling.report.training_page import at_a_glance, embedded, run_figures
from blackpoint.sampling.report.training_series import Series
from blackpoint.sampling.whole_file import write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Gallery:
    """Pictures of the same prompts and seeds, a line for each setting."""

    captions: list[str]
    lines: list[tuple[str, list[str]]]
    note: str = ""


@dataclass
class ReportContent:
    """What a page shows; empty parts are left out."""

    title: str
    introduction: str = ""
    tables: Sequence[Table] = ()
    """What was evaluated beside the run."""
    luminance: str | None = None
    """How bright its images are, as SVG."""
    gallery: Gallery | None = None
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


def write_report(path: Path, content: ReportContent) -> Path:
    """Writes the page and returns its path; the file is whole or as it was before."""
    write_whole(path, render(content))
    return path


def render(content: ReportContent) -> str:
    """Renders the page as HTML text."""
    return page_template(TEMPLATE).render(
        content=content,
        glance=at_a_glance(content.metrics, content.max_steps),
        run_figures=run_figures(content.metrics, content.prompts),
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
