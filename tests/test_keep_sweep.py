"""What of a sweep is kept in the repository."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from blackpoint.sampling.report.results import Cell, Results, Value
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.studies import keep_sweep
from blackpoint.scripts.studies.keep_sweep import cell_seconds, main


def made_up(is_paired: bool) -> Results:
    cells = []
    for number in range(2):
        value = Value(Estimate(0.5 + number, 0.4, 1.6, 2), "higher")
        paired = {"score": {(0, "a", 0): 0.25, (3, "b", 1): 1 / 3}} if is_paired else {}
        cells.append(Cell(f"cell {number}", values={"score": value, "FID": value}, paired=paired))
    return Results("made up", cells)


def rows(folder: Path) -> list[list[str]]:
    text = gzip.decompress((folder / "rows.csv.gz").read_bytes()).decode()
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.parametrize("is_paired", [False, True])
def test_a_sweep_is_kept_with_a_row_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_paired: bool
) -> None:
    """Without scores of single images there are no rows."""
    monkeypatch.setattr(keep_sweep, "read_results", lambda _: made_up(is_paired))
    assert main([f"run_dir={tmp_path}", f"output={tmp_path / 'kept'}"]) == 0
    header, *found = rows(tmp_path / "kept")
    assert header[:3] == ["cell", "prompt_index", "image"]
    own = [["0", "0", "0.25"], ["3", "1", "0.333333"]]
    expected = [[f"cell {number}", *each] for number in range(2) for each in own]
    assert found == (expected if is_paired else [])
    assert (tmp_path / "kept" / "figure.png").is_file()


def test_a_metric_that_no_cell_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(keep_sweep, "read_results", lambda _: made_up(True))
    output = tmp_path / "kept"
    assert main([f"run_dir={tmp_path}", f"output={output}", "metrics=[scores]"]) == 2
    assert "the nearest is 'score'" in capsys.readouterr().err
    assert not output.exists()


def test_seconds_are_of_the_cells_that_the_sweep_has_now(tmp_path: Path) -> None:
    assert cell_seconds(tmp_path) == {}
    for folder, seconds in (("one-new", 2.0), ("one-old", 1.0)):
        path = tmp_path / "cells" / folder / "cell.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"name": "one", "seconds": seconds}))
    cells = [{"name": name, "folder": f"cells/{name}-new"} for name in ("one", "not run")]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells}))
    assert cell_seconds(tmp_path) == {"one": 2.0}
