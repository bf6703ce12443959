"""Pages: titles, text, tables, plots and pictures, stated once, as HTML and as Markdown.

A page of HTML refers to nothing outside itself (plots are inline SVG, pictures data URIs, style and
script inlined), so it can be mailed or archived. Its tables sort by a click on a head and are
filtered by their controls, the pictures of its galleries are enlarged by a click, where arrow keys
lead from one to the next and a slider uncovers the one before. In Markdown plots are files beside
the page and galleries are left out. `code` in back quotes is set as such in both.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.statistics.table import Table

FOLDER = Path(__file__).parent
WIDEST_PX = 1400
JPEG_QUALITY = 88
Item = TypeVar("Item")


@dataclass(frozen=True)
class Block:
    """A titled part of a page, left out where it has no content."""

    title: str
    content: Any
    note: str = ""
    """Small print below the title, below a figure its caption."""


class Figure(Block):
    """A plot, as <svg> element, or a picture, as data URI."""

    @property
    def name(self) -> str:
        """The name of its file beside a page of Markdown, without .svg."""
        return re.sub(r"\W+", "_", self.title.lower())


class Items(Block):
    """A list of remarks."""


class Facts(Block):
    """Values by their names; under a title they are folded."""


class Choice(Block):
    """Tables of which one at a time is shown; the title names the choice."""


class Section(Block):
    """Parts in order; None is left out."""


@dataclass(frozen=True)
class Gallery(Block):
    """Names with a picture for each caption, as data URIs: a line for each name."""

    captions: Sequence[str] = ()
    before: str = ""
    """Which picture an enlarged one is compared with by a slider: that of the first `line` of its
    column, or the `first` of its line; none if empty."""


Part: TypeAlias = str | Table | Block


@dataclass(frozen=True)
class Page:
    """Contents of a page, in order; None and empty parts are left out."""

    title: str
    parts: Sequence[Part | None]
    refresh_s: float = 0
    """Seconds after which a browser loads it again; 0: it stays."""

    def html(self) -> str:
        """Renders the page as one HTML file."""
        refresh_s = self.refresh_s
        return _template().render(title=self.title, parts=self.parts, refresh_s=refresh_s)

    def markdown(self) -> str:
        """Writes the page as Markdown."""
        return "\n\n".join(_blocks(Section(self.title, self.parts), 1)) + "\n"


def shown(parts: Sequence[Part | None]) -> list[Part]:
    """Returns the parts in which there is something."""
    return [part for part in parts if part is not None and _has_content(part)]


def _has_content(part: Part) -> bool:
    if isinstance(part, Section):
        return bool(shown(part.content))
    return bool(part.content if isinstance(part, Block) else part)


def _template() -> Template:
    """Reads the template, which has `style` and `script` and tests for each kind of part."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name, file in (("style", "page.css"), ("script", "page.js")):
        environment.globals[name] = (FOLDER / file).read_text(encoding="utf-8")
    for kind in (Table, Figure, Gallery, Items, Facts, Choice):
        environment.tests[kind.__name__.lower()] = lambda part, kind=kind: isinstance(part, kind)
    environment.filters["shown"] = shown
    environment.filters["code"] = _with_code
    return environment.from_string((FOLDER / "page.html.j2").read_text(encoding="utf-8"))


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Chooses at most so many items, evenly from the first to the last."""
    count = min(most, len(items))
    numbers = sorted({round(n * (len(items) - 1) / max(1, count - 1)) for n in range(count)})
    return [items[number] for number in numbers]


def embedded(path: Path, widest_px: int = WIDEST_PX, most_bytes: float = math.inf) -> str:
    """Returns a picture as data URI: a small PNG as it is, else a JPEG of at most `widest_px`."""
    with opened(path) as picture:
        if max(picture.size) <= widest_px and path.stat().st_size <= most_bytes:
            return data_uri("png", path.read_bytes())
        return embedded_picture(picture, widest_px)


def embedded_picture(picture: Image.Image, widest_px: int) -> str:
    """Returns a picture as a JPEG of at most `widest_px` in a data URI."""
    small, data = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((widest_px, widest_px), Image.Resampling.LANCZOS)
    small.save(data, "JPEG", quality=JPEG_QUALITY)
    return data_uri("jpeg", data.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")


def opened(path: Path) -> Image.Image:
    """Opens a picture; raises UserError for a file that is none."""
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); restore it") from error
    return picture


def _with_code(text: str) -> str:
    """Escapes a text; words in back quotes are set as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _blocks(part: Part, level: int) -> list[str]:
    """Returns the blocks of Markdown of a part whose title stands at a level."""
    if isinstance(part, str):
        return [part]
    head = [f"{'#' * level} {part.title}"] if part.title else []
    note = [part.note] if part.note else []
    match part:
        case Table():
            return [*head, *note, part.markdown().rstrip()]
        case Figure():
            return [*head, f"![{part.title}]({part.name}.svg)", *note]
        case Items():
            return [*head, *note, "\n".join(f"- {line}" for line in part.content)]
        case Facts():
            return [*head, "\n".join(f"- {name}: {v}" for name, v in part.content.items())]
        case Gallery():
            return []
    return [*head, *note, *(b for inner in shown(part.content) for b in _blocks(inner, level + 1))]
