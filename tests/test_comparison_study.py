"""The comparison of searches: shares of best-of-32's gain, from cells whose answer is known."""

from pathlib import Path

import numpy as np
import pytest

from blackpoint.sampling.report.results import Cell
from blackpoint.sampling.statistics.candidate_scores import Candidates
from blackpoint.sampling.statistics.table import read_texts
from blackpoint.scripts.studies.comparison import kept_cells, tables_of

PROMPTS, SIZE = 40, 32
SCORES = ("reader", "sharpness", "darkness", "judge_beside", "reads_beside")


def best_of_32(seed: int) -> Cell:
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=(PROMPTS, SIZE)) for name in SCORES}
    scores["judge_beside"] = 0.5 * scores["reader"]
    cell = Cell("random, 768", "random, 768", {"search.seed": seed}, nfe=768, seconds=32)
    cell.candidates = Candidates(scores, SCORES)
    cell.paired = {"reader (searched)": {(p, "", 0): 0.0 for p in range(PROMPTS)}}
    return cell


def search(arm: str, reference: Cell, columns: range, nfe: float) -> Cell:
    """A search that takes the best by the reader of some of the same images."""
    assert reference.candidates is not None
    scores = reference.candidates.scores
    chosen = scores["reader"][:, columns].argmax(axis=1)
    values = {name: scores[name][np.arange(PROMPTS), chosen] for name in SCORES}
    named = {"reader (searched)": "reader", "judge": "judge_beside", "judge reads": "reads_beside"}
    cell = Cell(arm, arm, reference.varied, nfe=nfe, seconds=nfe / 24)
    cell.paired = {
        name: {(p, "", 0): float(value) for p, value in enumerate(values[of])}
        for name, of in named.items()
    }
    return cell


def test_shares_of_the_gain_are_those_of_searches_that_choose_among_the_same_images() -> None:
    references = [best_of_32(seed) for seed in range(3)]
    cells = [
        *references,
        *(search("all of them, 768", cell, range(SIZE), 768) for cell in references),
        *(search("the first eight, 192", cell, range(8), 192) for cell in references),
        search("one seed, 192", references[1], range(8), 192),
        search("of another family with guidance 3, 192", references[1], range(8), 192),
    ]
    tables = list(tables_of(cells))
    assert [table.title for table in tables][0] == "Guidance 1, log-odds"
    rows = {row["search"]: row for row in tables[0].rows}
    names = [f"best of {n}" for n in (1, 4, 8, 16, 32)]
    assert list(rows) == [*names, "all of them", "the first eight", "one seed"]
    assert rows["best of 1"]["share of the gain"].value == pytest.approx(0)
    for name in ("best of 32", "all of them"):
        row = rows[name]
        assert row["share of the gain"].value == pytest.approx(1)
        assert row["judge's share"].value == pytest.approx(1)  # it is half of the searched score
        assert row["minus best-of-n of its NFE"].value == pytest.approx(0, abs=1e-12)
    # E of the largest of 8 and of 32 normal numbers: 1.4236 and 2.0697 (Harter 1961).
    assert rows["best of 8"]["share of the gain"].value == pytest.approx(1.4236 / 2.0697, abs=0.05)
    eight = rows["the first eight"]
    readers = [cell.candidates.scores["reader"] for cell in references if cell.candidates]
    found = np.mean([x[:, :8].max(axis=1) - x.mean(axis=1) for x in readers])
    whole = np.mean([x.max(axis=1) - x.mean(axis=1) for x in readers])
    assert eight["share of the gain"].value == pytest.approx(found / whole)
    assert eight["share of the gain"].low < found / whole < eight["share of the gain"].high
    assert (eight["NFE"], eight["of best-of-32's"], eight["seeds"]) == (192, 0.25, 3)
    assert rows["one seed"]["seeds"] == 1


def test_the_kept_rows_give_the_kept_tables_again() -> None:
    """So that a comparison that one machine began is continued by another."""
    folder = Path("docs/comparison_24_steps")
    tables = {table.name: table for table in tables_of(list(kept_cells(folder).values()))}
    for name in ("shares_0", "shares_1", "shares_2", "shares_3"):
        header, rows = tables[name].values()
        kept = read_texts(folder / f"{name}.csv")
        assert [row["search"] for row in kept] == [row[0] for row in rows]
        for before, row in zip(kept, rows, strict=True):
            for column, value in list(zip(header, row, strict=True))[1:]:
                # Scores are kept to six digits, and shares are ratios of their differences.
                assert float(before[column]) == pytest.approx(value, abs=5e-4, rel=2e-5)
