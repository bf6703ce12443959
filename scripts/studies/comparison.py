"""Every search at equal cost: python -m blackpoint.scripts.studies.comparison runs
configs/comparison_24_steps.yaml.

A search's share of the gain is its mean gain over one image divided by best-of-32's:

    share = mean_p(s_p - one_p) / mean_p(best_p - one_p),

s_p averaged over seeds, the interval by a paired bootstrap over prompts. one_p and best_p, as those
of best-of-4, 8 and 16, are exact expectations over the 32 images that best-of-32 made of a prompt;
a judge that has no part in the choice reads all of them. The same command goes on where it stopped.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.results import Cell, Value, read_results
from blackpoint.sampling.report.results_page import table_files
from blackpoint.sampling.statistics.candidate_scores import (
    Candidates,
    expected_of_best,
    scores_by_prompt,
)
from blackpoint.sampling.statistics.estimates import Estimate, mean_ratio, mean_score
from blackpoint.sampling.statistics.paired import mean_difference
from blackpoint.sampling.statistics.table import Table, read_texts
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.keep_sweep import CANDIDATE_ROWS, COLUMNS, ROWS, KeepConfig, keep
from blackpoint.scripts.studies.study import blackpoint
from blackpoint.scripts.sweep.cells import cells_of, chosen_of
from blackpoint.scripts.sweep.config import SweepConfig

YAML = "configs/comparison_24_steps.yaml"
JUDGE, READS = "judge", "judge reads"
BESIDE = {JUDGE: "judge_beside", READS: "reads_beside"}
"""Held-out judge -> the same as a verifier without weight, which sees every candidate."""
SIZES = (4, 8, 16)
CELLS = ("*_seed-0", "*, 24_seed-*", "*, 96_seed-*", "*, 192_seed-*", "random, 768_seed-*")
"""All seeds of what costs at most a quarter of best-of-32, and of that; one seed of the others."""


@dataclass(frozen=True)
class Family:
    """Searches that are compared with one best-of-32."""

    ending: str
    """Of the names of its arms, before the NFE."""
    reference: str
    """Its best-of-32, whose candidates hold every score."""
    score: str
    """What is searched for."""
    title: str


FAMILIES = (
    Family("", "random, 768", "reader", "Guidance 1, log-odds"),
    Family(" with guidance 3", "random with guidance 3, 1536", "reader", "Guidance 3, log-odds"),
    Family(" of sharpness", "random, 768", "sharpness", "Guidance 1, sharpness"),
    Family(" of darkness", "random, 768", "darkness", "Guidance 1, darkness"),
)


@dataclass
class ComparisonConfig:
    """How much is run, and where the tables go."""

    num_processes: int = 2
    """Searches that are run at once."""
    only: list[str] = field(default_factory=lambda: list(CELLS))
    """Cells of the sweep that are run, by name."""
    output: str = "docs/comparison_24_steps"
    """Folder of the tables and rows."""


@dataclass(frozen=True)
class Reference:
    """The candidates of best-of-32 of each prompt, a cell per seed."""

    cells: tuple[Cell, ...]
    score: str

    @cached_property
    def size(self) -> int:
        """Candidates of a prompt."""
        return self._scores(self.cells[0])[self.score].shape[1]

    def best(self, count: int, quality: str, seeds: list[Any]) -> np.ndarray:
        """Returns the expected quality of the best of `count`, mean over `seeds`, (P,)."""
        found = []
        for cell in self.cells:
            if seed_of(cell) in seeds:
                scores = self._scores(cell)
                name = BESIDE.get(quality, quality)
                found.append(expected_of_best(scores[self.score], scores[name], count))
        return np.mean(found, axis=0)

    @staticmethod
    def _scores(cell: Cell) -> dict[str, np.ndarray]:
        assert cell.candidates is not None
        return cell.candidates.scores


def study(config: ComparisonConfig) -> None:
    """Runs what is missing, reports it and keeps the tables of what is done."""
    sweep, output = load(SweepConfig, [YAML]), Path(config.output)
    kept = kept_cells(output)
    missing = [c.name for c in chosen_of(cells_of(sweep), config.only) if c.name not in kept]
    if missing:
        asked = f"only=[{', '.join(repr(name) for name in missing)}]"
        blackpoint("sweep", YAML, f"num_processes={config.num_processes}", asked)
    results = read_results(Path(sweep.run_dir))
    results = replace(results, cells=[kept.get(cell.name, cell) for cell in results.cells])
    columns = ["reader (searched)", JUDGE]
    keep(KeepConfig(sweep.run_dir, config.output, columns, ["cells"]), results)
    for name, content in table_files(list(tables_of(results.cells))).items():
        write_whole(output / name, content)


def kept_cells(folder: Path) -> dict[str, Cell]:
    """Reads the cells that the tables of a folder hold, which another machine may have run."""
    if not (folder / ROWS).is_file():
        return {}
    kept: dict[str, Cell] = {}
    for row in read_texts(folder / "cells.csv"):
        if row["NFE"]:
            cell = Cell(f"{row['arm']}_seed-{row['seed']}", row["arm"])
            cell.varied = {"search.seed": int(row["seed"])}
            cell.nfe, cell.seconds = float(row["NFE"]), float(row["seconds"])
            kept[cell.name] = cell
    for row in read_texts(folder / ROWS):
        name, prompt, image = (row.pop(column) for column in COLUMNS)
        for title, score in row.items():
            if score:
                key = (int(prompt), "", int(image))
                kept[name].paired.setdefault(title, {})[key] = float(score)
    for cell in kept.values():
        for title, scores in cell.paired.items():
            cell.values[title] = Value(mean_score(list(scores.values())), "higher")
    candidates: dict[str, list[tuple[int, int, dict[str, str]]]] = {}
    for row in read_texts(folder / CANDIDATE_ROWS):
        name, prompt, number = (row.pop(column) for column in ("cell", "prompt", "candidate"))
        named = {title: score for title, score in row.items() if score}
        candidates.setdefault(name, []).append((int(prompt), int(number), named))
    for name, rows in candidates.items():
        scores_of = scores_by_prompt(rows, list(rows[0][2]))
        kept[name].candidates = Candidates(scores_of, tuple(scores_of)) if scores_of else None
    return kept


def tables_of(cells: list[Cell]) -> Iterator[Table]:
    """Yields a table for each family of searches whose best-of-32 is done."""
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.paired:
            arms.setdefault(cell.arm, []).append(cell)
    for number, family in enumerate(FAMILIES):
        reference = arms.get(family.reference)
        if reference:
            lines = list(lines_of(family, Reference(tuple(reference), family.score), arms))
            columns = {"search": "", "NFE": ".0f", "of best-of-32's": ".3f", "seconds": ".2f"}
            columns |= {"share of the gain": ".3f", "judge's share": ".2f", "judge reads": ".3f"}
            columns |= {"minus best-of-n of its NFE": "+.3f", "seeds": "", "prompts": ""}
            yield Table(lines, columns, family.title, NOTE, f"shares_{number}")


NOTE = (
    "Share of the gain: by the searched score, of best-of-32's; judge's share: by the log-odds of "
    "a reader that nobody searched with; judge reads: share of digits that it reads right. "
    "Minus best-of-n: the searched score beside the expected best of as many images as the NFE "
    "pay for. 95 % intervals, paired over prompts."
)


def lines_of(
    family: Family, reference: Reference, arms: dict[str, list[Cell]]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a family: best-of-n from the candidates of best-of-32, then the arms."""
    whole = reference.cells[0].nfe
    seeds = [seed_of(cell) for cell in reference.cells]
    qualities = (family.score, JUDGE, READS)
    for size in (1, *SIZES, reference.size):
        scores = {name: reference.best(size, name, seeds) for name in qualities}
        nfe = whole * size / reference.size
        seconds = reference.cells[0].seconds * size / reference.size
        yield line(f"best of {size}", nfe, seconds, scores, reference, family.score, seeds)
    named = re.compile(rf"(.+?){re.escape(family.ending)}, (\d+)")
    endings = [other.ending for other in FAMILIES if other.ending]
    for arm, cells in arms.items():
        match = named.fullmatch(arm)
        if match is None or arm == family.reference:
            continue
        if not family.ending and any(match[1].endswith(ending) for ending in endings):
            continue
        found = [seed_of(cell) for cell in cells]
        if set(found) - set(seeds):
            continue  # its best-of-32 is not done yet
        scores = {name: mean_of(cells, name) for name in qualities}
        nfe = float(np.mean([cell.nfe for cell in cells]))
        seconds = min(cell.seconds for cell in cells)  # other seeds may have shared their core
        yield line(match[1], nfe, seconds, scores, reference, family.score, found)


def line(
    name: str,
    nfe: float,
    seconds: float,
    scores: dict[str, np.ndarray],
    reference: Reference,
    score: str,
    seeds: list[Any],
) -> dict[str, Any]:
    """Returns the row of a search whose scores (P,) are means over these seeds."""
    whole = reference.cells[0].nfe

    def share(quality: str) -> Estimate:
        one = reference.best(1, quality, seeds)
        gain = reference.best(reference.size, quality, seeds) - one
        return mean_ratio(scores[quality] - one, gain)

    count = max(1, round(nfe / whole * reference.size))
    equal = reference.best(min(count, reference.size), score, seeds)
    return {
        "search": name,
        "NFE": nfe,
        "of best-of-32's": nfe / whole,
        "seconds": seconds,
        "share of the gain": share(score),
        "judge's share": share(JUDGE),
        "judge reads": float(scores[READS].mean()),
        "minus best-of-n of its NFE": mean_difference(scores[score], equal),
        "seeds": len(seeds),
        "prompts": len(equal),
    }


def mean_of(cells: list[Cell], quality: str) -> np.ndarray:
    """Returns a score of the winners, by prompt, mean over the cells; raises UserError."""
    found = []
    for cell in cells:
        paired = cell.paired.get(quality) or cell.paired.get(f"{quality} (searched)")
        if paired is None:
            raise UserError(f"cell {cell.name} has no score {quality}")
        found.append([value for _, value in sorted(paired.items())])
    return np.mean(found, axis=0)


def seed_of(cell: Cell) -> Any:
    """Returns the seed that a cell of the grid has."""
    return cell.varied.get("search.seed")


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("comparison", lambda: study(load(ComparisonConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
