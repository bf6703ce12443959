"""Tables of several images per prompt: which scores agree, and what the best of k is worth.

For every evaluation with several images per prompt and every best-of-N search. A search records
each of its verifiers for every candidate, also those of weight 0, which decide nothing.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from blackpoint.sampling.report.results_tables import CHANGE, marked_change
from blackpoint.sampling.statistics.candidate_scores import (
    Candidates,
    counts_up_to,
    finite_mean,
    gain_of_best,
    rank_correlation,
)
from blackpoint.sampling.statistics.table import Table

MINUS_FIRST = "minus the first score's"


def candidate_tables(cells: Mapping[str, Candidates]) -> list[Table]:
    """Returns the tables that say something; cells by the name of their setting."""
    tables = [_ranks(cells), _best_of(cells)]
    return [table for table in tables if table.rows]


def _ranks(cells: Mapping[str, Candidates]) -> Table:
    """Shows the mean rank correlation of every score with the first and with each quality."""
    rows: list[dict[str, Any]] = []
    for cell, candidates in cells.items():
        known = {next(iter(candidates.scores)), *candidates.qualities}
        for first, second in itertools.combinations(candidates.scores, 2):
            correlation = rank_correlation(candidates.scores, first, second)
            if correlation is not None and known & {first, second}:
                row = {"cell": cell, "score": first, "with": second}
                coefficients = {
                    "Spearman": marked_change(correlation.spearman),
                    "Kendall": marked_change(correlation.kendall),
                }
                rows.append({**row, **coefficients, "would have shown": correlation.detectable})
    note = (
        "Mean over prompts of the rank correlation over each prompt's images. Would have shown: "
        "the smallest mean Spearman that so many prompts find with power 0.8. Bold: the interval "
        "leaves out 0."
    )
    columns = {"cell": "", "score": "", "with": "", "Spearman": CHANGE, "Kendall": CHANGE}
    columns |= {"would have shown": ".3f"}
    title, filters = "Do scores rank a prompt's images alike?", ("cell", "score", "with")
    return Table(rows, columns, title, note, "ranks", filters=filters)


def _best_of(cells: Mapping[str, Candidates]) -> Table:
    """Shows the gain in each quality from the best of k images by each score."""
    sizes = {
        cell: next(iter(candidates.scores.values())).shape[1] for cell, candidates in cells.items()
    }
    counts = sorted({count for most in sizes.values() for count in counts_up_to(most)} - {1})
    rows = []
    for cell, candidates in cells.items():
        scores, first = candidates.scores, next(iter(candidates.scores))
        made = [count for count in counts_up_to(sizes[cell]) if count > 1]
        for quality, chosen_by in itertools.product(candidates.qualities, scores):
            row: dict[str, Any] = {"cell": cell, "best of k by": chosen_by, "quality": quality}
            for count in made:
                gain = gain_of_best(scores, chosen_by, quality, count)
                row[f"k = {count}"] = marked_change(finite_mean(gain))
            if chosen_by != first:
                gained, other = (
                    gain_of_best(scores, name, quality, sizes[cell]) for name in (chosen_by, first)
                )
                row[MINUS_FIRST] = marked_change(finite_mean(gained - other))
            rows.append(row)
    note = (
        "Expected quality of the best of k images by a score, minus that of a mean image of the "
        "prompt: over all subsets of the images, paired over prompts. Last: the choice among all "
        "images minus the first score's choice. Bold: the interval leaves out 0."
    )
    columns = {"cell": "", "best of k by": "", "quality": ""}
    columns |= {f"k = {count}": CHANGE for count in counts} | {MINUS_FIRST: CHANGE}
    title, filters = "What the best of k images is worth", ("cell", "best of k by", "quality")
    return Table(rows, columns, title, note, "best_of_k", filters=filters)
