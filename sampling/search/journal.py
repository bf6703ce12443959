"""candidates.jsonl: one row an evaluated candidate, written as it is evaluated, read after a kill.

A row is one line, flushed before the search goes on, so that a kill tears at most the last line; it
is cut off when the search resumes. What later rounds start from, the states of trials that end
before the last level, lies beside it until the prompt is finished: what was paid for is never run
again. Rows are found by (prompt_index, candidate), never by their place in the file.
`scores` holds what each verifier said, `score` what choices see: null for what is not finite.

Several processes write a file each (sampling/runtime/sharing.py) and read all of them.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.lock import Lock
from blackpoint.data.files.plain import json_object, number, recorded
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.runtime.sharing import FolderInUse, files_of
from blackpoint.sampling.search.costs import Ledger
from blackpoint.sampling.search.problem import Outcome, Result, Trial

ROWS, STATES = "candidates.jsonl", "states"
Rows = dict[int, dict[str, Any]]


class Journal:
    """The rows of one process's searches; reads those of earlier starts and other parts.

    It writes to `own`, a folder in the search's `folder` or that folder itself. `prompts`, if
    given, are the indices whose rows are of use; of the others only the costs are added up.
    """

    def __init__(
        self, folder: Path, part: Path | None = None, prompts: Iterable[int] | None = None
    ) -> None:
        self.folder, part = folder, part or folder
        self.spent = Ledger()
        """Of all rows in `own`."""
        self.rows: dict[int, Rows] = {}
        part.mkdir(parents=True, exist_ok=True)
        self._file = (part / ROWS).open("a", encoding="utf-8")
        self._lock = Lock(part / ROWS)
        if not self._lock.acquire(holder=""):  # the file is the rows
            self._file.close()
            raise FolderInUse(
                f"output={part}: another process is searching there; wait for it, or choose "
                "another output"
            )
        wanted = None if prompts is None else set(prompts)
        for path in files_of(folder, ROWS):
            is_own = path.samefile(part / ROWS)
            for row in read_rows(path, repair=is_own):
                try:
                    if is_own:
                        self.spent += Ledger(**row["spent"])
                    if wanted is None or row["prompt_index"] in wanted:
                        self._keep(row)
                except (LookupError, TypeError) as error:
                    raise UserError(
                        f"{path}: a row is not a candidate's ({type(error).__name__}: {error}); it "
                        "was changed by hand: remove it, or choose another output"
                    ) from error

    def close(self) -> None:
        """Closes the file; every row is in it already."""
        self._file.close()
        self._lock.release()

    def find(self, prompt_index: int, trial: Trial) -> Outcome | None:
        """Returns the outcome of a trial that was recorded, or None where it must be run.

        Raises UserError where the record is of another search.
        """
        row = self.rows.get(prompt_index, {}).get(trial.candidate)
        if row is None:
            return None
        expected = (trial.round, trial.seed, trial.parent, trial.num_steps)
        if (row["round"], row["seed"], row["parent"], row.get("num_steps")) != expected:
            raise UserError(
                f"output={self.folder}: candidate {trial.candidate} of prompt {prompt_index} in "
                f"{ROWS} belongs to a search with other settings; choose another output"
            )
        score = number(row["score"])
        scores = {name: number(value) for name, value in row["scores"].items()}
        if trial.goal in ("final", "draft"):
            return Outcome(trial, score, row["nfe"], None, scores)
        path = self._state_path(prompt_index, trial.candidate)
        if not path.is_file():
            return None
        tensors = load_file(path)
        state = SampleState(tensors["x"], trial.stop, tensors.get("x0"))
        return Outcome(trial, score, row["nfe"], state, scores)

    def write(self, prompt_index: int, result: Result, about: Mapping[str, Any]) -> None:
        """Appends a candidate's row, after the state that later rounds need."""
        outcome, trial = result.outcome, result.outcome.trial
        if outcome.state is not None:
            path = self._state_path(prompt_index, trial.candidate)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"x": outcome.state.x, "x0": outcome.state.x0}
            save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
        before, number = self.rows.get(prompt_index, {}), trial.candidate
        row = {
            "prompt_index": prompt_index,
            "round": trial.round,
            "candidate": trial.candidate,
            "parent": trial.parent,
            "seed": trial.seed,
            "goal": trial.goal,
            "stop": trial.stop,
            **({} if trial.num_steps is None else {"num_steps": trial.num_steps}),
            "score": outcome.score if math.isfinite(outcome.score) else None,
            "scores": recorded(outcome.scores),
            "nfe": outcome.nfe,
            "nfe_so_far": outcome.nfe + sum(r["nfe"] for n, r in before.items() if n < number),
            "seconds": round(result.seconds, 4),
            "spent": vars(result.spent),
            **about,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.spent += result.spent
        self._keep(row)

    def forget(self, prompt_index: int) -> None:
        """Drops the data of a finished prompt: its rows in memory, its states."""
        self.rows.pop(prompt_index, None)
        shutil.rmtree(self.folder / STATES / f"{prompt_index:06d}", ignore_errors=True)

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.setdefault(row["prompt_index"], {})[row["candidate"]] = row

    def _state_path(self, prompt_index: int, candidate: int) -> Path:
        return self.folder / STATES / f"{prompt_index:06d}" / f"{candidate:06d}.safetensors"


def read_rows(path: Path, repair: bool = True) -> list[dict[str, Any]]:
    """Reads whole rows; a torn last line is left out, and cut off the file with `repair`.

    Raises UserError for a line that is torn but not the last: it was not a kill that did it.
    """
    content = path.read_bytes()
    rows, good = [], 0
    for line_number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            rows.append(json_object(line, path))
        except ValueError as error:
            if good + len(line) != len(content):
                raise UserError(
                    f"{path}:{line_number} is not JSON: it was changed by hand or the disk lost "
                    "it; remove the line to pay for that candidate again, or choose another output"
                ) from error
            if repair:
                with path.open("rb+") as file:
                    file.truncate(good)
                    os.fsync(file.fileno())
            break
        good += len(line)
    return rows


def rows_by_key(output: Path, name: str, key: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Reads the rows of the whole search and of its parts, by their values of `key`."""
    rows = (row for path in files_of(output, name) for row in read_rows(path, repair=False))
    return {itemgetter(*key)(row): row for row in rows}


def join_rows(output: Path, name: str, key: Sequence[str]) -> list[dict[str, Any]]:
    """Writes the rows of the whole search and of its parts to output/name, sorted; returns them."""
    rows = [row for _, row in sorted(rows_by_key(output, name, key).items())]
    write_whole(output / name, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
