"""What a report reads of a sweep's folder: cells of other versions, stale and unfinished ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from blackpoint.sampling.report.results import read_results
from blackpoint.scripts.cli import main


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"version": 0, "cells": []}))
    assert main(["report", f"run_dir={tmp_path}"]) == 2
    assert "another version" in capsys.readouterr().err
    cell = {"name": "a", "arm": "", "varied": {}, "folder": "cells/a", "training": "a-1"}
    for section, said in (({"evaluate": {"seed": 0}}, "no cell of the sweep is done"), ({}, "a-1")):
        content = {"version": 1, "cells": [cell | section]}
        (tmp_path / "sweep.json").write_text(json.dumps(content))
        assert main(["report", f"run_dir={tmp_path}"]) == 2
        assert said in capsys.readouterr().err
    assert main(["report", f"run_dir={tmp_path / 'absent'}"]) == 2


def write_search(folder: Path, row: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "winners.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "hacking.json").write_text("[]")


WINNER = {
    "prompt_index": 0,
    "prompt": "a cat",
    "held_out": {},
    "scores": {"dark": 1.0},
    "image": "x",
    "nfe": 3,
}


def write_sweep(folder: Path, *cells: dict[str, Any], record: dict[str, Any]) -> None:
    rows = [{"name": n, "arm": n, "varied": {}, "folder": f"cells/{n}"} for n in ("one", "two")]
    for row in rows[: len(cells)]:
        path = folder / str(row["folder"]) / "cell.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"state": "done"} | record))
    content = [row | cell for row, cell in zip(rows, cells, strict=False)]
    (folder / "sweep.json").write_text(json.dumps({"version": 1, "cells": content}))


def test_a_cell_of_another_version_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    write_search(tmp_path / "cells" / "one" / "search", WINNER)
    write_search(tmp_path / "cells" / "two" / "search", {"prompt_index": 0})
    write_sweep(tmp_path, {"search": {"seed": 0}}, {"search": {"seed": 0}}, record={})
    found = read_results(tmp_path)
    assert [cell.state for cell in found.cells] == ["done", "not readable"]


def test_a_cell_that_evaluates_and_searches_has_two_lines(tmp_path: Path) -> None:
    write_search(tmp_path / "cells" / "one" / "search", WINNER)
    both = {"evaluate": {"seed": 0}, "search": {"seed": 0}}
    write_sweep(tmp_path, both, record={"digest": ""})
    evaluation, search = read_results(tmp_path).cells
    assert (evaluation.name, evaluation.nfe) == (
        "one evaluate",
        pytest.approx(math.nan, nan_ok=True),
    )
    assert search.nfe == 3 and search.setting == "one, verb search" and search.values


def test_a_cell_measured_with_other_settings_is_called_stale(tmp_path: Path) -> None:
    write_search(tmp_path / "cells" / "one" / "search", WINNER)
    for digest, state in (("a", "done"), ("b", "stale")):
        write_sweep(tmp_path, {"search": {"seed": 0}, "digest": "a"}, record={"digest": digest})
        [cell] = read_results(tmp_path).cells
        assert cell.state == state and cell.values
