"""GenEval's scores from a detector's file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metrics.geneval import TASKS, read_geneval
from blackpoint.sampling.statistics.estimates import proportion


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def row(task: str, prompt: int, correct: bool) -> dict[str, Any]:
    return {"filename": "x.png", "tag": task, "prompt": f"{task} {prompt}", "correct": correct}


def test_the_overall_score_is_the_mean_of_the_tasks_not_of_the_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(task, prompt, bool(rng.random() < 0.2 + 0.1 * number))
        for number, task in enumerate(TASKS)
        for prompt in range(5 + 20 * number)
        for _ in range(4)
    ]
    found = read_geneval(write(tmp_path / "results.jsonl", rows))
    shares = {task: np.mean([r["correct"] for r in rows if r["tag"] == task]) for task in TASKS}
    assert list(found.tasks) == list(TASKS) and not found.missing
    for task, share in shares.items():
        assert found.tasks[task].value == pytest.approx(share)
        assert found.tasks[task].low <= share <= found.tasks[task].high
    assert found.overall.value == pytest.approx(np.mean(list(shares.values())))
    assert found.overall.value != pytest.approx(np.mean([r["correct"] for r in rows]))
    assert found.overall.n == len(rows) // 4


def test_images_of_a_prompt_do_not_narrow_the_interval(tmp_path: Path) -> None:
    once = [row("colors", prompt, prompt % 2 == 0) for prompt in range(40)]
    one, four = (
        read_geneval(write(tmp_path / f"{n}.jsonl", once * n)).tasks["colors"] for n in (1, 4)
    )
    assert (one.value, one.low, one.high, one.n) == (four.value, four.low, four.high, four.n)
    assert read_geneval(tmp_path / "1.jsonl").missing == tuple(t for t in TASKS if t != "colors")


def test_a_task_that_is_always_right_leaves_doubt(tmp_path: Path) -> None:
    rows = [row("colors", prompt, True) for prompt in range(12)]
    found = read_geneval(write(tmp_path / "results.jsonl", rows))
    assert found.tasks["colors"] == found.overall == proportion(12, 12)
    one = read_geneval(write(tmp_path / "one.jsonl", rows[:1])).tasks["colors"]
    assert (one.value, one.high) == (1, 1) and one.low < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("nonsense\n", "results.jsonl:1: not a row"),
        ('{"tag": "colors", "prompt": "a"}\n', "each holds prompt, tag and correct"),
        ('{"tag": "colors", "prompt": "a", "correct": 1}\n', "must be true or false"),
    ],
)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_geneval(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_geneval(tmp_path / "nothing.jsonl")
