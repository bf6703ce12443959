"""The report page of a search: plain images above winners, their scores, the alarm."""

import math
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import inside
from blackpoint.data.files.plain import number, read_array, read_json, read_lines
from blackpoint.sampling.report.page import Gallery, Items, Section, embedded
from blackpoint.sampling.search.costs import costs_text
from blackpoint.sampling.statistics.best_of_n import table_of
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Table

NUM_SHOWN = 8
SEARCH_FILES = ("search.json", "winners.jsonl", "hacking.json", "ledger.json")


def search_section(folder: Path) -> Section | None:
    """Lays a finished search out; None where the folder holds none."""
    if not all((folder / name).is_file() for name in SEARCH_FILES):
        return None
    settings, alarms = read_json(folder / "search.json"), read_array(folder / "hacking.json")
    rows = read_lines(folder / "winners.jsonl")
    paired = [row for row in rows if row["baseline"] is not None]
    costs = costs_text(read_json(folder / "ledger.json"), len(rows))
    beside = read_json(folder / "best_of_n.json")
    ends = Counter(row["note"] for row in rows if row["note"])
    notes = [*beside.get("notes", []), *(f"{note} ({n} prompts)" for note, n in ends.items())]
    target = settings.get("target")
    until = "" if target is None else f", until {target:g} is reached"
    return Section(
        "Search over noise",
        [
            Items("", [finding["line"] for alarm in alarms for finding in alarm["findings"]]),
            Items("", notes),
            table_of(beside["lines"]) if beside.get("lines") else None,
            search_gallery(folder),
            scores_table(paired, alarms),
        ],
        f"{settings['algorithm']}, {costs} per prompt{until}, "
        f"{settings['num_steps']} steps, guidance {settings['guidance_scale']:g}; "
        f"{len(rows)} prompts.",
    )


def search_gallery(folder: Path, title: str = "") -> Gallery | None:
    """Shows the plain images above the winners, with the searched score and the seeds of both; None
    where no image was kept.

    Where no seed re-makes a winner, its seed is that of the draws that it came from.
    """
    rows, candidates = read_lines(folder / "winners.jsonl"), folder / "candidates.jsonl"
    if not any((folder / row["image"]).is_file() for row in rows):
        return None
    drawn = read_lines(candidates) if candidates.is_file() else []
    seeds = {(row["prompt_index"], row["candidate"]): row["seed"] for row in drawn}
    paired = [row for row in rows if row.get("baseline")]
    shown, captions = (paired or rows)[:NUM_SHOWN], []
    lines = [("winner", [_picture(folder, row["image"]) for row in shown])]
    if paired:
        plain = [_picture(folder, row["baseline"]["image"]) for row in shown]
        lines.insert(0, ("first seed", plain))
    for row in shown:
        seed, first = row["seed"], row["baseline"] or {}
        if seed is None:
            seed = f"from {seeds.get((row['prompt_index'], row['candidate']), 'a kept noise')}"
        of = f"seed {first['seed']} -> {seed}" if first else f"seed {seed}"
        captions.append(f"{row['prompt']} \u00b7 {row['score']:.3f} \u00b7 {of}")
    note = (
        "Each column is one prompt, the first ones: the plain image of its first seed where it was "
        "kept, and the image of the noise that the search chose; the number is the searched score."
    )
    return Gallery(title, lines, note, captions, before="line")


def _picture(folder: Path, name: str) -> str:
    if (path := inside(folder, name)) is None:
        raise UserError(f"{folder}/winners.jsonl names a picture outside of the folder: {name}")
    return embedded(path)


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
