"""A search beside best-of-N at the same cost, from whole runs of independent noises.

Of r runs of a prompt, f of them below a target, the best of n <= r drawn among them has a mean
E(n) (`expected_of_best`), and passes with P = 1 - C(f, n) / C(r, n). Beyond r each doubling adds
q times what the one before did,

    E(n) = E(r) + [E(r) - E(r / 2)] (q + q^2 + ...),   q = [E(r) - E(r / 2)] / [E(r / 2) - E(r / 4)]

with q of the means over prompts, at most 1 (of normal scores this is 1 % low at 32 from 8 runs, and
scores that saturate stay in their range), and P = 1 - (f / r)^n. Two doublings take four runs: a
prompt with fewer finite scores is left out. An n that is not whole, a mean NFE over that of one
image, lies between its neighbours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from blackpoint.sampling.statistics.candidate_scores import expected_of_best
from blackpoint.sampling.statistics.estimates import Estimate, mean
from blackpoint.sampling.statistics.table import Table

Rows = Sequence[Mapping[str, Any]]
"""Those of winners.jsonl or of candidates.jsonl."""
FEWEST_RUNS = 4
COLUMNS = {
    "search": "",
    "prompts": "d",
    "NFE per prompt": ".1f",
    "mean score": ".4f",
    "passed": ".1%",
    "search ahead by": "+.4f n",
}
HOW = {
    "calibration": (
        "best-of-N is expected from the calibration's whole runs of the same prompts; for more "
        "images than they are, from how their best grows with every doubling"
    ),
    "own": "best-of-N passes where one of the first N images of this search does",
}


def expected_bests(runs: Sequence[Sequence[float]], n: float) -> list[float]:
    """Returns the expected best of n runs of each prompt, from the scores of some runs of each."""
    r = min(map(len, runs))
    scores = np.array([run[:r] for run in runs])

    def of_each(k: float) -> np.ndarray:
        return between(lambda m: expected_of_best(scores, scores, m), k)

    if n <= r:
        return of_each(n).tolist()
    quarter, half, whole = (of_each(k) for k in (r / 4, r / 2, r))
    first, last = (half - quarter).mean(), (whole - half).mean()
    q = min(1.0, last / first) if first > 0 else 0.0
    doublings = math.log2(n / r)
    growth = doublings if q == 1 else q * (1 - q**doublings) / (1 - q)
    return (whole + (whole - half) * growth).tolist()


def passing_chance(scores: Sequence[float], target: float, n: float) -> float:
    """Returns the chance that one of n of the runs reaches the target."""
    r, below = len(scores), sum(score < target for score in scores)

    def of_whole(k: int) -> float:
        failed = (below / r) ** k if k > r else math.comb(below, k) / math.comb(r, k)
        return 1 - failed

    return between(of_whole, n)


def between(value: Callable[[int], Any], n: float) -> Any:
    """Interpolates a function of whole numbers from 1 on."""
    n = max(n, 1.0)
    low, part = math.floor(n), n - math.floor(n)
    return value(low) + (part * (value(low + 1) - value(low)) if part else 0.0)


def comparison(
    name: str,
    winners: Rows,
    candidates: Rows,
    calibration: Rows,
    target: float | None,
    highest: float = math.inf,
) -> list[dict[str, Any]]:
    """Returns the search and best-of-N at its mean NFE, on the prompts of its calibration.

    Without one, of a random search with a target, best-of-N is read from the search's own rows;
    other searches stand alone. Nothing without calibration and target. highest: no score is above.
    """
    if not (calibration or target is not None):
        return []
    lines = [_line(name, winners, target)]
    runs, whole_nfe = whole_runs(calibration)
    paired = [row for row in winners if len(runs.get(row["prompt_index"], ())) >= FEWEST_RUNS]
    if len(paired) > 1:
        if len(paired) < len(winners):
            lines.append(_line(f"{name}, prompts of the calibration", paired, target))
        nfe = fmean(row["nfe"] for row in paired)
        n, own = nfe / whole_nfe, [runs[row["prompt_index"]] for row in paired]
        bests = [min(best, highest) for best in expected_bests(own, n)]
        ahead = mean([row["score"] - best for row, best in zip(paired, bests, strict=True)])
        chances = [] if target is None else [passing_chance(scores, target, n) for scores in own]
        passed = fmean(chances) if chances else None
        lines.append(_row(f"best-of-{n:.3g}", len(own), nfe, fmean(bests), passed, ahead))
    elif name == "random" and target is not None:
        lines.append(_first_images(winners, candidates, target))
    return lines


def whole_runs(rows: Rows) -> tuple[dict[int, list[float]], float]:
    """Returns the final scores of a calibration by prompt, and the NFE of one whole run."""
    by_key = {(row["prompt_index"], row["candidate"]): row for row in rows}
    runs: dict[int, list[float]] = {}
    whole_nfe = 0
    for row in rows:
        if row["goal"] == "final":
            if row["score"] is not None:
                runs.setdefault(row["prompt_index"], []).append(row["score"])
            part, whole_nfe = row, row["nfe"]
            while part["parent"] is not None:
                part = by_key[row["prompt_index"], part["parent"]]
                whole_nfe += part["nfe"] * (part["goal"] == "preview")
    return runs, whole_nfe


def table_of(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the lines of `comparison` as a table, without columns that are empty."""
    rows = [
        {
            key: Estimate(**value) if isinstance(value, dict) else value
            for key, value in line.items()
        }
        for line in lines
    ]
    columns = {
        column: form
        for column, form in COLUMNS.items()
        if any(row[column] is not None for row in rows)
    }
    return Table(rows, columns)


def _first_images(winners: Rows, candidates: Rows, target: float) -> dict[str, Any]:
    """Returns the share of prompts of which one of the first n images passes."""
    nfe, image_nfe = fmean(row["nfe"] for row in winners), candidates[0]["nfe"]
    last = {row["prompt_index"]: row["nfe"] // image_nfe for row in winners}
    passes = [last[row["prompt_index"]] for row in winners if row["score"] >= target]
    share = between(lambda k: sum(n <= k for n in passes) / len(winners), nfe / image_nfe)
    return _row(f"best-of-{nfe / image_nfe:.3g}", len(winners), nfe, None, share)


def _line(name: str, winners: Rows, target: float | None) -> dict[str, Any]:
    scores = [row["score"] for row in winners]
    passed = None if target is None else fmean(score >= target for score in scores)
    nfe = fmean(row["nfe"] for row in winners)
    return _row(name, len(winners), nfe, fmean(scores), passed)


def _row(
    name: str,
    prompts: int,
    nfe: float,
    score: float | None,
    passed: float | None,
    ahead: Estimate | None = None,
) -> dict[str, Any]:
    values = (name, prompts, nfe, score, passed, None if ahead is None else asdict(ahead))
    return dict(zip(COLUMNS, values, strict=True))
