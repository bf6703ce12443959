"""candidates.jsonl: one row an evaluated candidate, written as it is evaluated, read after a kill.

A row is one line, flushed before the search goes on, so that a kill tears at most the last line; it
is cut off when the search resumes. What later rounds start from, the states of trials that end
before the last level, lies beside it until the prompt is finished: what was paid for is never run
again. Rows are found by (prompt_index, candidate), never by their place in the file.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sampling.errors import UserError
from sampling.samplers import SampleState
from sampling.search.runner import Result
from sampling.search.trial import Outcome, Trial

ROWS, STATES = "candidates.jsonl", "states"


class Journal:
    """The rows of one process's searches in `folder`; reads what an earlier start has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}
        path = folder / ROWS
        if path.is_file():
            for row in read_rows(path):
                self.rows[row["prompt_index"], row["candidate"]] = row
        folder.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; every row is in it already."""
        self._file.close()

    def find(self, prompt_index: int, trial: Trial) -> Outcome | None:
        """Returns the outcome of a trial that was recorded, or None where it must be run.

        Raises UserError where the record is of another search.
        """
        row = self.rows.get((prompt_index, trial.candidate))
        if row is None:
            return None
        expected = (trial.round, trial.seed, trial.parent)
        if (row["round"], row["seed"], row["parent"]) != expected:
            raise UserError(
                f"output={self.folder}: candidate {trial.candidate} of prompt {prompt_index} in "
                f"{ROWS} belongs to a search with other settings; choose another output"
            )
        score = math.nan if row["score"] is None else row["score"]
        scores = {name: math.nan if v is None else v for name, v in row["scores"].items()}
        if trial.goal == "final":
            return Outcome(trial, score, row["nfe"], None, scores)
        path = self._state_path(prompt_index, trial.candidate)
        if not path.is_file():
            return None
        tensors = load_file(path)
        state = SampleState(tensors["x"], trial.stop, tensors.get("x0"))
        return Outcome(trial, score, row["nfe"], state, scores)

    def write(self, prompt_index: int, result: Result, about: Mapping[str, Any]) -> None:
        """Appends a candidate's row, after what later rounds need of it."""
        outcome, trial = result.outcome, result.outcome.trial
        if outcome.state is not None:
            path = self._state_path(prompt_index, trial.candidate)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"x": outcome.state.x, "x0": outcome.state.x0}
            save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
        row = {
            "prompt_index": prompt_index,
            "round": trial.round,
            "candidate": trial.candidate,
            "parent": trial.parent,
            "seed": trial.seed,
            "goal": trial.goal,
            "stop": trial.stop,
            "score": _finite(outcome.score),
            "scores": {name: _finite(value) for name, value in outcome.scores.items()},
            "nfe": outcome.nfe,
            "seconds": round(result.seconds, 4),
            **about,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows[prompt_index, trial.candidate] = row

    def forget_states(self, prompt_index: int) -> None:
        """Removes what only an unfinished prompt needs."""
        shutil.rmtree(self.folder / STATES / f"{prompt_index:06d}", ignore_errors=True)

    def _state_path(self, prompt_index: int, candidate: int) -> Path:
        return self.folder / STATES / f"{prompt_index:06d}" / f"{candidate:06d}.safetensors"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads whole rows; a torn last line is cut off the file.

    Raises UserError for a line that is torn but not the last: it was not a kill that did it.
    """
    content = path.read_bytes()
    rows, good = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            rows.append(json.loads(line))
        except ValueError as error:
            if good + len(line) != len(content):
                raise UserError(
                    f"{path}:{number} is not JSON: it was changed by hand or the disk lost it; "
                    "remove the line to pay for that candidate again, or choose another output"
                ) from error
            with path.open("rb+") as file:
                file.truncate(good)
                os.fsync(file.fileno())
            break
        good += len(line)
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
