"""The report of `data check` as tables for a terminal.

Keys and captions come from strangers: they are shown as plain text, control characters escaped.
"""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from blackpoint.data.bad_samples import printable
from blackpoint.data.check.report import MAX_WORDS, CheckReport, Copies, Luminance, Spread

BAR_CHARACTERS = 40
_COPIES = {
    "images": "image files that repeat an earlier one, byte for byte",
    "near_images": "pictures that look like an earlier one (scaled or compressed otherwise)",
    "captions": "captions that repeat an earlier one",
    "keys": "keys that an earlier shard has too (both samples are kept)",
}


def tables(report: CheckReport) -> Iterator[Table | Text]:
    """Yields the lines to print, from counts to bad samples."""
    yield _counts(report)
    if report.sizes:
        spreads = {f"{name}, px": report.sizes[name] for name in ("width", "height")}
        spreads["width / height"] = report.sizes["aspect"]
        yield _spreads("images", spreads, 2)
    if report.luminance:
        yield from _luminance(report.luminance, report.num_samples)
    if report.captions:
        captions = report.captions
        yield _spreads("captions", {"characters": captions.characters, "words": captions.words}, 0)
        if captions.num_several:
            yield Text(
                f"{captions.num_several:,} samples have several captions, of which training draws "
                "one per epoch; the longest of each is counted here.\n"
            )
        if captions.num_cut:
            share = captions.num_cut / report.num_samples
            yield Text(
                f"{captions.num_cut} captions ({share:.1%}) have more than {MAX_WORDS} words: the "
                "text encoder reads 77 tokens and the rest is cut.\n"
            )
    if report.copies:
        yield from _copies(report.copies)
    if report.bad:
        yield _bad(report)


def _counts(report: CheckReport) -> Table:
    table = Table("", "", box=None, show_header=False)
    rows = {
        "samples": f"{report.num_samples:,}",
        "bad samples": f"{len(report.bad):,}",
        "shards": f"{report.num_shards:,}",
        "size": f"{report.num_bytes / 1e6:,.1f} MB",
    }
    if report.encoding is not None:
        of = [
            f"{name} {report.encoding[name]}"
            for name in ("resolution", "crop", "dtype", "checkpoint", "source", "error")
            if name in report.encoding
        ]
        rows["content"] = f"latents from `data encode`: {', '.join(of)}"
    if report.num_enlarged is not None:
        share = report.num_enlarged / max(report.num_samples, 1)
        rows[f"below {report.resolution} px"] = (
            f"{report.num_enlarged:,} images ({share:.1%}), which training enlarges"
        )
    state = report.index
    rows["index"] = f"{state.state}: {state.folder}"
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    for note in state.notes:
        table.add_row("", Text(note))
    return table


def _spreads(title: str, spreads: dict[str, Spread], digits: int) -> Table:
    table = Table(title, box=SIMPLE_HEAD)
    for column in ("min", "5 %", "25 %", "median", "75 %", "95 %", "max"):
        table.add_column(column, justify="right")
    for name, values in spreads.items():
        whole = all(value.is_integer() for value in values.values())
        table.add_row(name, *(f"{value:.{0 if whole else digits}f}" for value in values.values()))
    return table


def _luminance(luminance: Luminance, num_samples: int) -> Iterator[Table | Text]:
    table = Table(f"luminance ({luminance.weights})", "images", "", box=SIMPLE_HEAD)
    most = max(luminance.histogram)
    for number, count in enumerate(luminance.histogram):
        bar = "#" * -(-count * BAR_CHARACTERS // max(most, 1))
        table.add_row(f"{number / 10:.1f} to {(number + 1) / 10:.1f}", f"{count:,}", bar)
    yield table
    yield Text(
        f"nearly black (below .05): {luminance.share_nearly_black:.2%}; "
        f"nearly white (above .95): {luminance.share_nearly_white:.2%}\n"
    )


def _copies(copies: dict[str, Copies]) -> Iterator[Table | Text]:
    table = Table("duplicates", "", box=SIMPLE_HEAD)
    for name, meaning in _COPIES.items():
        table.add_row(f"{copies[name].count:,}", meaning)
    yield table
    for name in ("images", "near_images", "keys"):
        for first, second in copies[name].examples:
            what = name.replace("_", " ").removesuffix("s")
            yield Text(f"  same {what}: {printable(first)} and {printable(second)}")


def _bad(report: CheckReport) -> Table:
    table = Table("bad samples", "reason", box=SIMPLE_HEAD)
    for reason, count in report.bad_kinds.items():
        table.add_row(f"{count:,}", Text(printable(reason)))
    return table
