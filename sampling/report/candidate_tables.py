"""Tables of several images per prompt: which scores agree, and what the best of k is worth.

For every evaluation with several images per prompt and every best-of-N search. A search records
each of its verifiers for every candidate, also those of weight 0, which decide nothing.
"""

import itertools
from collections.abc import Mapping

from blackpoint.sampling.report.results_tables import Table, TableCell, signed_cell
from blackpoint.sampling.statistics.candidate_scores import (
    Candidates,
    counts_up_to,
    finite_mean,
    gain_of_best,
    rank_correlation,
)


def candidate_tables(cells: Mapping[str, Candidates]) -> list[Table]:
    """Returns the tables that say something; cells by the name of their setting."""
    tables = [_ranks(cells), _best_of(cells)]
    return [table for table in tables if table.rows]


def _ranks(cells: Mapping[str, Candidates]) -> Table:
    """Shows the mean rank correlation of every score with the first and with each quality."""
    rows = []
    for cell, candidates in cells.items():
        known = {next(iter(candidates.scores)), *candidates.qualities}
        for first, second in itertools.combinations(candidates.scores, 2):
            found = rank_correlation(candidates.scores, first, second)
            if found is not None and known & {first, second}:
                line = [TableCell(text) for text in (cell, first, second)]
                line += [signed_cell(each) for each in (found.spearman, found.kendall)]
                rows.append([*line, TableCell(f"{found.detectable:.3f}", number=found.detectable)])
    note = (
        "Mean over prompts of the rank correlation over each prompt's images. Would have shown: "
        "the smallest mean Spearman that so many prompts find with power 0.8. Bold: the interval "
        "leaves out 0."
    )
    header = ["cell", "score", "with", "Spearman", "Kendall", "would have shown"]
    return Table("ranks", "Do scores rank a prompt's images alike?", note, header, rows, [0, 1, 2])


def _best_of(cells: Mapping[str, Candidates]) -> Table:
    """Shows what choosing the best of k images by each score gains by each quality."""
    sizes = {cell: next(iter(each.scores.values())).shape[1] for cell, each in cells.items()}
    columns = sorted({count for most in sizes.values() for count in counts_up_to(most)} - {1})
    rows = []
    for cell, candidates in cells.items():
        scores, first = candidates.scores, next(iter(candidates.scores))
        for quality, chosen_by in itertools.product(candidates.qualities, scores):
            line = [TableCell(text) for text in (cell, chosen_by, quality)]
            for count in columns:
                is_made = count in counts_up_to(sizes[cell])
                gain = gain_of_best(scores, chosen_by, quality, count) if is_made else None
                line.append(signed_cell(None if gain is None else finite_mean(gain)))
            change = None
            if chosen_by != first:
                own, other = (
                    gain_of_best(scores, name, quality, sizes[cell]) for name in (chosen_by, first)
                )
                change = finite_mean(own - other)
            rows.append([*line, signed_cell(change)])
    note = (
        "Expected quality of the best of k images by a score, minus that of a mean image of the "
        "prompt: over all subsets of the images, paired over prompts. Last: the choice among all "
        "images minus the first score's choice. Bold: the interval leaves out 0."
    )
    header = ["cell", "best of k by", "quality", *(f"k = {count}" for count in columns)]
    title = "What the best of k images is worth"
    return Table("best_of_k", title, note, [*header, "minus the first score's"], rows, [0, 1, 2])
