"""What a page shows of a search: plain images above winners, their scores, the alarm."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from blackpoint.data.files.plain import number
from blackpoint.sampling.report.training_page import embedded

NUM_SHOWN = 8
SEARCH_FILES = ("search.json", "winners.jsonl", "hacking.json")


@dataclass(frozen=True)
class SearchShown:
    """One search, as a page has it; pictures are data URIs."""

    settings: str
    captions: list[str]
    lines: list[tuple[str, list[str]]]
    """A name and a picture of each prompt: the plain images, the winners."""
    numbers: list[tuple[str, str, str, str]]
    """Score, mean of the plain images, mean of the winners, difference with its interval."""
    findings: list[str]
    """What the alarm says; empty if nothing fell while the searched score rose."""


def read_search(folder: Path) -> SearchShown | None:
    """Reads the folder of a finished search; None where there is none."""
    if not all((folder / name).is_file() for name in SEARCH_FILES):
        return None
    settings, alarms = (json.loads((folder / f).read_text("utf-8")) for f in SEARCH_FILES[::2])
    text = (folder / "winners.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    paired = [row for row in rows if row["baseline"] is not None]
    shown = (paired or rows)[:NUM_SHOWN]
    lines = [("winner", [embedded(folder / row["image"]) for row in shown])]
    if paired:
        plain = [embedded(folder / row["baseline"]["image"]) for row in shown]
        lines.insert(0, ("first seed", plain))
    nfe = mean(row["nfe"] for row in rows)
    return SearchShown(
        f"{settings['algorithm']}, {nfe:.0f} NFE a prompt, {settings['num_steps']} steps, guidance "
        f"{settings['guidance_scale']:g}; {len(rows)} prompts",
        [f"{row['prompt']} \u00b7 {row['score']:.3f}" for row in shown],
        lines,
        _numbers(paired, alarms),
        [finding["line"] for alarm in alarms for finding in alarm["findings"]],
    )


def _numbers(
    rows: list[dict[str, Any]], alarms: list[dict[str, Any]]
) -> list[tuple[str, str, str, str]]:
    changes = {name: change for alarm in alarms for name, change in alarm["changes"].items()}
    found = []
    for key, what in (("scores", "searched"), ("held_out", "held out")):
        for name in rows[0][key] if rows else ():
            pairs = [(number(row["baseline"][key][name]), number(row[key][name])) for row in rows]
            finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
            if not finite:  # every score of it was rejected
                continue
            plain, best = zip(*finite, strict=True)
            found.append((f"{name} ({what})", f"{mean(plain):.3f}", f"{mean(best):.3f}", name))
    found += [(name, "", "", name) for name in changes if name == "diversity"]
    return [(*cells, _change(changes.get(name))) for *cells, name in found]  # type: ignore[misc]


def _change(change: dict[str, Any] | None) -> str:
    if change is None:
        return ""
    return f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] n={change['n']}"
