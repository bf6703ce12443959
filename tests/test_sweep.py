"""`blackpoint sweep`: cells and their names, what is run again and what is not, failures, stops."""

import contextlib
import io
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blackpoint.sampling.evaluation.summary import read_summary
from blackpoint.scripts.cli import main
from blackpoint.scripts.sweep.cells import trainings_of
from blackpoint.scripts.sweep.runner import log_of, read_cell
from blackpoint.scripts.verbs.sweep import share_of_element
from tests.tiny_sweep import EVALUATE, cells, start_cells_warm, sweep
from tests.waiting import names_in, wait_for
from tests.warm_verb import WarmVerb


def with_model(pipeline: Path) -> dict[str, Any]:
    return {**EVALUATE, "checkpoint": str(pipeline)}


def training(pipeline: Path, shards: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(pipeline),
        "batch_size": 4,
        "data.shards": str(shards),
        "data.resolution": 16,
        "data.num_workers": 0,
        "trainer.max_steps": 2,
        "preview.every_steps": 0,
        "wandb.enabled": False,
    }


def test_a_grid_is_every_arm_with_every_value(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        evaluate={**EVALUATE, "checkpoint": "model"},
        arms={"plain": {}, "rescaled": {"evaluate.guidance_rescale": 0.5}},
        grid={"evaluate.num_steps": [4, 8], "evaluate": {"seed": [0, 1]}},
    )
    assert [cell.name for cell in found][:3] == [
        "plain_num_steps-4_seed-0",
        "plain_num_steps-4_seed-1",
        "plain_num_steps-8_seed-0",
    ]
    assert len(found) == 8 and len({cell.folder for cell in found}) == 8
    assert found[5].sections["evaluate"]["guidance_rescale"] == 0.5
    assert found[5].sections["evaluate"]["num_steps"] == 4


def test_names_stay_when_the_grid_grows(tmp_path: Path) -> None:
    base = {**EVALUATE, "checkpoint": "model"}
    before = cells(tmp_path, evaluate=base, grid={"evaluate.seed": [0, 1]})
    for cell in before:
        cell.folder.mkdir(parents=True)
    longer = cells(tmp_path, evaluate=base, grid={"evaluate.seed": [0, 1, 2]})
    assert [c.folder for c in longer][:2] == [c.folder for c in before]
    # A new key whose old value is among its values, an arm's name, where it runs: the same cells.
    wider = cells(
        tmp_path,
        evaluate={**base, "device": "cpu", "batch_size": 7},
        arms={"named": {}},
        grid={"evaluate.guidance_rescale": [0.7, 0.1], "evaluate.seed": [0, 1]},
    )
    assert [c.folder for c in wider][:2] == [c.folder for c in before]
    assert not {c.folder for c in wider[2:]} & {c.folder for c in before}
    # A measure more is the same images, and not done yet.
    measured = {**base, "verifiers.dark.kind": "luminance", "verifiers.dark.target": 0.0}
    more = cells(tmp_path, evaluate=measured, grid={"evaluate.seed": [0, 1]})
    assert [c.folder for c in more] == [c.folder for c in before]
    assert [c.digest for c in more] != [c.digest for c in before]


def test_a_value_that_was_the_default_finds_the_training_of_then(tmp_path: Path) -> None:
    """A training of 512 px from when that was the default goes on, said or not; a new one of the
    checkpoint's own size is another."""

    def folder(**values: Any) -> Path:
        train = training(Path("base"), Path("shards")) | values
        (one,) = trainings_of(cells(tmp_path, train=train, evaluate=EVALUATE))
        return one.folder

    own, said = folder(**{"data.resolution": 0}), folder(**{"data.resolution": 512})
    assert own != said != folder()
    own.mkdir(parents=True)
    for resolution, found in ((64, said), (512, own)):
        (own / "config.yaml").write_text(f"data: {{resolution: {resolution}}}")
        assert folder(**{"data.resolution": 512}) == found
        assert folder(**{"data.resolution": 0}) == own


def test_cells_share_a_training(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        train=training(Path("base"), Path("shards")),
        arms={"a": {}, "b": {"evaluate.guidance_rescale": 0.1}, "c": {"train.loss.floor": 0.2}},
        grid={"train.seed": [0, 1]},
    )
    assert len(found) == 6 and len(trainings_of(found)) == 4
    assert found[0].training == found[2].training
    assert found[0].sections["evaluate"]["checkpoint"] == str(found[0].training.folder)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"grid": {"evaluate.num_step": [1]}}, "did you mean `num_steps`"),
        ({"grid": {"num_steps": [1]}}, "did you mean evaluate.num_steps?"),
        ({"arms": {"a": {"evalute.seed": 1}}}, "did you mean evaluate.seed?"),
        ({"grid": {"evaluate.num_steps": []}}, "must be a list of one value or more"),
        ({"grid": {"evaluate.num_steps": [2, 0]}}, "num_steps=0 is out of range; it must be >= 1"),
        ({"grid": {"evaluate.num_steps": [2, 2]}}, "are the same"),
        ({"grid": {"evaluate.batch_size": [1, 2]}}, "changes no image"),
        ({"arms": {"a": 3}}, "must be a mapping"),
        ({"evaluate": {**EVALUATE, "checkpoint": "x", "output": "y"}}, "sweep's own to set"),
        ({"only": ["nothing*"], "grid": {"evaluate.seed": [5]}}, "the nearest is seed-5"),
        ({"train": {"checkpoint": "x", "data.shards": "y"}}, "evaluates what it trains"),
        ({"evaluate": {}}, "nothing to do"),
        ({"run_dir": __file__}, f"run_dir={__file__}: is a file; name a folder"),
        ({"evaluate": {"prompts": ["a"]}}, "checkpoint=..."),
        ({"evaluate": {"config": "absent.yaml"}}, "absent.yaml: there is no such file"),
        ({"grid": {"evaluate.checkpoint": ["/a/b", "a/b"]}}, "make arms of their settings"),
        ({"arms": {"plain": {}}, "baseline": "plane"}, "the nearest is plain"),
        ({"grid": {"evaluate.seed": [5]}, "baseline": "seed"}, "the nearest is seed-5"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    tmp_path: Path, capsys: Any, settings: dict[str, Any], expected: str
) -> None:
    base = {"evaluate": {**EVALUATE, "checkpoint": "model"}}
    path = sweep(tmp_path, **(base | settings))
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "sweep").exists()


def test_trainings_whose_names_hold_dots_have_logs_of_their_own(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        train=training(Path("base"), Path("shards")),
        grid={"train.optimizer.learning_rate": [0.0001, 0.0005]},
    )
    assert len({log_of(each) for each in trainings_of(found)}) == 2


def test_checkpoints_in_folders_called_trainings_are_told_apart(tmp_path: Path) -> None:
    paths = [f"runs/other/trainings/{name}" for name in "ab"]
    found = cells(tmp_path, grid={"evaluate.checkpoint": paths})
    assert len({cell.digest for cell in found}) == 2


def test_values_whose_last_parts_are_the_same_are_named_whole(tmp_path: Path) -> None:
    paths = ["/a/model", "/b/model", "/b/other"]
    found = cells(tmp_path, grid={"evaluate.checkpoint": paths})
    names = ["checkpoint-a-model", "checkpoint-b-model", "checkpoint-other"]
    assert [cell.name for cell in found] == names


def test_long_values_make_folders_whose_names_fit(tmp_path: Path) -> None:
    shards = [letter * 300 for letter in "ab"]
    found = cells(
        tmp_path,
        train=training(Path("base"), Path("shards")),
        grid={"train.data.shards": shards, "evaluate.negative_prompt": ["word " * 99]},
    )
    for cell, name in zip(found, shards, strict=True):
        assert cell.name.startswith(f"shards-{name}_negative_prompt-word-word")
        assert cell.training is not None
        assert len(cell.training.name) < 100 and len(cell.folder.name) < 100


@pytest.mark.parametrize("name", ["plain", "plain_seed-0_num_steps-4", "plain, num steps 4"])
def test_the_baseline_is_an_arm_a_cell_or_a_setting(tmp_path: Path, name: str) -> None:
    grid = {"evaluate.seed": [0, 1], "evaluate.num_steps": [4, 8]}
    settings = {"evaluate": {**EVALUATE, "checkpoint": "model"}, "arms": {"plain": {}}}
    assert len(cells(tmp_path, **settings, grid=grid, baseline=name)) == 4


def test_elements_of_an_array_share_the_cells() -> None:
    numbers = list(range(10))
    assert share_of_element(numbers, {}) == numbers

    def part(element: int, first: int, last: int, step: int, count: int) -> list[int]:
        values = {"ID": element, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
        names = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}
        return share_of_element(numbers, names)

    parts = [part(element, 0, 3, 1, 4) for element in range(4)]
    assert parts == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert [part(n, 3, 7, 1, 2) for n in (3, 7)] == [[3], [7]]  # --array=3,7
    assert [part(n, 0, 8, 2, 5) for n in (0, 2, 8)] == [[0], [2], [8]]  # --array=0-8:2


@pytest.fixture(autouse=True)
def warm_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    start_cells_warm(monkeypatch)


def run(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a sweep in this process."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(["sweep", str(path), *more])
    return subprocess.CompletedProcess(more, status, out.getvalue(), error.getvalue())


@pytest.mark.slow
def test_trained_evaluated_extended_and_never_run_again(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    settings = {
        "train": training(pipeline, shards),
        "search": {
            "prompts": ["a cat"],
            "num_steps": 2,
            "guidance_scale": 1.0,
            "budget_nfe": 6,
            "verifiers.dark.kind": "luminance",
            "verifiers.dark.target": 0.0,
        },
        "num_processes": 2,
    }
    path = sweep(tmp_path, **settings, grid={"evaluate.num_steps": [1, 2]})
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted((tmp_path / "sweep" / "cells").iterdir())
    assert len(folders) == 2 and len(list((tmp_path / "sweep" / "trainings").glob("*/"))) == 1
    for folder in folders:
        assert read_summary(folder / "evaluation") is not None
        assert (folder / "search" / "winners.jsonl").is_file()
        assert read_cell(folder)["state"] == "done" and len(read_cell(folder)["starts"]) == 1
    path = sweep(tmp_path, **settings, grid={"evaluate.num_steps": [1, 2, 3]})
    plan = run(path, "plan=true").stdout
    assert plan.count("done") == 2 and plan.count("new") == 1 and "--array=0-2" in plan
    assert run(path).returncode == 0
    for folder in folders:
        assert len(read_cell(folder)["starts"]) == 1
    index = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [cell["varied"]["evaluate.num_steps"] for cell in index["cells"]] == [1, 2, 3]


@pytest.mark.slow
def test_a_failed_cell_is_listed_with_its_log_and_the_others_run(
    pipeline: Path, tmp_path: Path
) -> None:
    grid = {"evaluate.checkpoint": [str(pipeline), str(tmp_path / "absent")]}
    path = sweep(tmp_path, grid=grid)
    done = run(path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 of 2 cells failed" in done.stderr and "log.txt" in done.stderr
    assert "absent" in done.stderr
    states = {read_cell(each)["state"] for each in (tmp_path / "sweep" / "cells").iterdir()}
    assert states == {"done", "failed"}
    (tmp_path / "absent").symlink_to(pipeline)  # put right, it is tried again
    assert run(path).returncode == 0


@pytest.mark.slow
def test_a_cell_that_lacks_a_metric_is_tried_again(pipeline: Path, tmp_path: Path) -> None:
    clip = {"verifiers.clip.kind": "clip_score", "verifiers.clip.checkpoint": "/nowhere"}
    path = sweep(tmp_path, evaluate={**with_model(pipeline), **clip})
    done = run(path)
    assert done.returncode == 0 and "without clip" in done.stdout, done.stderr
    assert "new" in run(path, "plan=true").stdout


@pytest.mark.slow
def test_a_training_that_fails_is_tried_once_and_fails_its_cells(
    pipeline: Path, tmp_path: Path
) -> None:
    settings = training(pipeline, tmp_path / "absent")
    path = sweep(tmp_path, train=settings, grid={"evaluate.num_steps": [1, 2]})
    done = run(path)
    assert done.returncode == 1 and "2 of 2 cells failed" in done.stderr
    assert done.stderr.count("its training failed") == 2
    [log] = (tmp_path / "sweep" / "trainings").glob("*.log")
    assert str(log) in done.stderr and log.read_text().count("blackpoint: ") == 1


@pytest.mark.slow
def test_stopped_it_says_so_and_goes_on(pipeline: Path, tmp_path: Path) -> None:
    grid = {"evaluate.seed": [0, 1]}
    path = sweep(tmp_path, evaluate={**with_model(pipeline), "num_images": 16}, grid=grid)
    process = WarmVerb("sweep", str(path))  # its cells start as ever
    cell_folders = tmp_path / "sweep" / "cells"

    def is_measuring() -> bool:
        return any(names_in(cell_folders / name / "evaluation") for name in names_in(cell_folders))

    wait_for(is_measuring, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "the same command continues" in error
    assert run(path).returncode == 0
    unbroken = sweep(
        tmp_path,
        run_dir=str(tmp_path / "unbroken"),
        evaluate={**with_model(pipeline), "num_images": 16},
        grid=grid,
    )
    assert run(unbroken).returncode == 0
    for folder in cell_folders.iterdir():
        one = read_summary(folder / "evaluation")
        two = read_summary(tmp_path / "unbroken" / "cells" / folder.name / "evaluation")
        assert one is not None and two is not None and one.metrics == two.metrics
