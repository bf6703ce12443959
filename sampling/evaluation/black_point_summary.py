"""What the rows of the black-point study say: a table of estimates, each with its n and 95 %
interval.

Computed from rows alone, in any order, so committed rows give the same table again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blackpoint.sampling.report.rows import DATA, Row, write_rows
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.estimates import Estimate

OPEN_STD = "open: std of border luminance"
OPEN_RATIO = "open: std over the data's"
READ = "digits read"


def border_name(group: str, guidance_scale: float) -> str:
    """Names the mean border luminance of black or white captions at one guidance scale."""
    return f"{group}: border luminance, guidance {guidance_scale:g}"


def read_difference_name(baseline: str) -> str:
    """Names the difference of digits read between a checkpoint and the first one."""
    return f"{READ}, minus {baseline}"


@dataclass(frozen=True)
class Finding:
    """One number of the table."""

    checkpoint: str
    quantity: str
    estimate: Estimate


def summary(
    rows: Sequence[Row], checkpoints: Sequence[str], read_guidance_scale: float = 3.0
) -> list[Finding]:
    """Computes the table; `checkpoints` gives the order, its first is what digits read are compared
    with.

    A quantity whose rows are absent is left out.
    """
    rows = sorted(
        rows, key=lambda row: row.key
    )  # resampling then doesn't depend on the order given
    real = [row for row in rows if row.checkpoint == DATA]
    real_border = [row.border_luminance for row in real]
    findings = []
    if real:
        findings.append(Finding(DATA, OPEN_STD, statistics.std(real_border)))
        findings.append(Finding(DATA, READ, digits_read(real)))
    baseline = [row for row in rows if row.checkpoint == checkpoints[0]]
    for name in checkpoints:
        own = [row for row in rows if row.checkpoint == name]
        compared = None if name == checkpoints[0] else baseline
        findings += [Finding(name, *pair) for pair in _open(own, real_border)]
        findings += [Finding(name, *pair) for pair in _named(own)]
        findings += [
            Finding(name, *pair)
            for pair in _read(own, compared, checkpoints[0], read_guidance_scale)
        ]
    return findings


def digits_read(rows: Sequence[Row]) -> Estimate:
    """Estimates the share of images whose digit is read as the caption asked."""
    return statistics.proportion(sum(row.digit == row.digit_read for row in rows), len(rows))


def _open(rows: list[Row], real_border: list[float]) -> list[tuple[str, Estimate]]:
    border = [
        row.border_luminance for row in rows if row.group == "open" and row.guidance_scale == 1
    ]
    if len(border) < 2:
        return []
    pairs = [(OPEN_STD, statistics.std(border))]
    if len(real_border) > 1:
        pairs.append((OPEN_RATIO, statistics.std_ratio(border, real_border)))
    return pairs


def _named(rows: list[Row]) -> list[tuple[str, Estimate]]:
    pairs = []
    for group in ("black", "white"):
        named = [row for row in rows if row.group == group]
        for scale in sorted({row.guidance_scale for row in named}):
            border = [row.border_luminance for row in named if row.guidance_scale == scale]
            pairs.append((border_name(group, scale), statistics.mean(border)))
    return pairs


def _read(
    rows: list[Row], baseline: list[Row] | None, baseline_name: str, guidance_scale: float
) -> list[tuple[str, Estimate]]:
    own = [row for row in rows if row.guidance_scale == guidance_scale and row.group != "open"]
    if not own:
        return []
    read = digits_read(own)
    pairs = [(READ, read)]
    if baseline is not None:
        drawn = {(row.cell, row.index) for row in own}
        other = [row for row in baseline if (row.cell, row.index) in drawn]
        if other:
            reference = digits_read(other)
            counts = [round(each.value * each.n) for each in (read, reference)]
            difference = statistics.proportion_difference(counts[0], read.n, counts[1], reference.n)
            pairs.append((read_difference_name(baseline_name), difference))
    return pairs


def table(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Lays findings out as a header (quantity, then checkpoints) and one row of texts per
    quantity."""
    checkpoints = list(dict.fromkeys(finding.checkpoint for finding in findings))
    cells = {(finding.quantity, finding.checkpoint): finding.estimate for finding in findings}
    quantities = sorted(dict.fromkeys(finding.quantity for finding in findings), key=_place)
    lines = []
    for quantity in quantities:
        found = [cells.get((quantity, name)) for name in checkpoints]
        lines.append([quantity, *("" if each is None else show(each, quantity) for each in found)])
    return ["quantity", *checkpoints], lines


def show(estimate: Estimate, quantity: str = "") -> str:
    """Writes an estimate as `value [low, high] n=N`; shares of digits in percent."""
    if quantity.startswith(READ):
        sign = "+" if "minus" in quantity else ""
        value, low, high = (100 * each for each in (estimate.value, estimate.low, estimate.high))
        return f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}] n={estimate.n}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] n={estimate.n}"


def markdown(findings: Sequence[Finding]) -> str:
    """Writes the table as Markdown."""
    header, lines = table(findings)
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]) + "\n"


def write_summary(
    output: Path, rows: Sequence[Row], checkpoints: Sequence[str], read_guidance_scale: float
) -> list[Finding]:
    """Writes rows.csv.gz, summary.json and summary.md into `output`; returns the findings."""
    findings = summary(rows, checkpoints, read_guidance_scale)
    write_rows(output / "rows.csv.gz", rows)
    plain = [asdict(finding) for finding in findings]
    (output / "summary.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    note = (
        "Value [95 % interval] number of images. Border: outer two rows and columns, luminance 0 "
        "(black) to 1 (white). Intervals: bootstrap for means and standard deviations, Wilson and "
        "Newcombe for shares.\n\n"
    )
    (output / "summary.md").write_text(note + markdown(findings), encoding="utf-8")
    return findings


def _place(quantity: str) -> tuple[int, str]:
    """Orders the quantities of the table: (a), (b) by color and guidance, (c)."""
    order = (OPEN_STD, OPEN_RATIO, "black", "white", READ)
    place = next(number for number, start in enumerate(order) if quantity.startswith(start))
    return place, quantity
