"""The report page of a search: plain images above winners, their scores, the alarm."""

import math
from pathlib import Path
from statistics import mean
from typing import Any

from blackpoint.data.files.plain import number, read_json, read_lines
from blackpoint.sampling.report.page import Gallery, Items, Section, embedded
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Table

NUM_SHOWN = 8
SEARCH_FILES = ("search.json", "winners.jsonl", "hacking.json")


def search_section(folder: Path) -> Section | None:
    """Lays a finished search out; None where the folder holds none."""
    if not all((folder / name).is_file() for name in SEARCH_FILES):
        return None
    settings, alarms = read_json(folder / "search.json"), read_json(folder / "hacking.json")
    rows = read_lines(folder / "winners.jsonl")
    paired = [row for row in rows if row["baseline"] is not None]
    shown = (paired or rows)[:NUM_SHOWN]
    lines = [("winner", [embedded(folder / row["image"]) for row in shown])]
    if paired:
        plain = [embedded(folder / row["baseline"]["image"]) for row in shown]
        lines.insert(0, ("first seed", plain))
    captions = [f"{row['prompt']} \u00b7 {row['score']:.3f}" for row in shown]
    nfe = mean(row["nfe"] for row in rows)
    return Section(
        "Search over noise",
        [
            Items("", [finding["line"] for alarm in alarms for finding in alarm["findings"]]),
            Gallery("", lines, captions=captions),
            scores_table(paired, alarms),
        ],
        f"{settings['algorithm']}, {nfe:.0f} NFE per prompt, "
        f"{settings['num_steps']} steps, guidance {settings['guidance_scale']:g}; "
        f"{len(rows)} prompts. Each column is one prompt: the plain image of its "
        "first seed, and the image of the noise that the search found; the number is the searched "
        "score.",
    )


def scores_table(rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> Table | None:
    """Shows mean scores of the plain images and of the winners; None where there are none."""
    changes = {
        name: Estimate(**change) for alarm in alarms for name, change in alarm["changes"].items()
    }
    lines = []
    for key, what in (("scores", "searched"), ("held_out", "held out")):
        for name in rows[0][key] if rows else ():
            pairs = [(number(row["baseline"][key][name]), number(row[key][name])) for row in rows]
            finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
            if not finite:  # every score of it was rejected
                continue
            plain, best = map(mean, zip(*finite, strict=True))
            lines.append((f"{name} ({what})", plain, best, changes.get(name)))
    if "diversity" in changes:
        lines.append(("diversity", None, None, changes["diversity"]))
    columns = {"mean score": "", "first seed": ".3f", "winner": ".3f"}
    columns["difference, paired over prompts"] = "+.3f n"
    return Table.of(columns, lines) if lines else None
