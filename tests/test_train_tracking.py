"""Laws of what wandb gets of a run: every row once, in one run, whether it answers or not."""

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import wandb

import blackpoint.train.records.run_directory
import blackpoint.train.run
from blackpoint.sampling.prompts.brightness_target import luminance_target
from blackpoint.sampling.report.results import Cell
from blackpoint.sampling.runtime.tracking import WandbConfig, run_id, start_run, trained_by
from blackpoint.scripts.cli import main
from blackpoint.scripts.verbs.report_results import origin_of
from blackpoint.train.records.metrics_file import drop_rows_after
from blackpoint.train.records.tracking import finish, send_artifacts, sent_rows, wandb_logger
from tests.tiny_run import Killed, kill, stop_in_step, tiny_config
from tests.wandb_records import wandb_records


def wandb_rows(run_dir: Path) -> list[tuple[int, str]]:
    """Reads (step, name) of every history row of the offline runs, pictures once a step."""
    found = []
    for record in wandb_records(run_dir, "history"):
        names = {name.partition(".")[0] for name in record["item"]}
        step = record["item"].get("trainer/global_step")
        if step is not None:
            found += [(step, name) for name in names if not name.startswith(("_", "trainer/"))]
    return found


@pytest.mark.slow
def test_wandb_gets_every_row_once_however_the_run_was_broken(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    settings = {
        "wandb.enabled": True,
        "trainer.checkpoint_every_steps": 3,
        "data.validation_shards": str(shards),
        "trainer.validate_every_steps": 2,
        "preview.every_steps": 2,
        "preview.num_steps": 1,
        "preview.num_images": 1,
    }
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    config = tiny_config(run_dir, pipeline, shards, **settings)
    for step in (5, 4):  # the second start does not come as far as the first
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, step, kill)
            with pytest.raises(Killed):
                blackpoint.train.run.fit(config)
        time.sleep(1.1)  # wandb names its folders by the second
    assert blackpoint.train.run.fit(config) == 0
    assert "wandb is offline" in capsys.readouterr().err
    run_id = (run_dir / "wandb" / "run_id").read_text()
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))) == 3
    rows = Counter(wandb_rows(run_dir))
    assert set(rows.values()) == {1}
    assert {step for step, name in rows if name == "train/loss"} == set(range(1, 7))
    for name in ("previews", "preview_table"):
        assert {step for step, other in rows if other == name} == {0, 2, 4, 6}
    assert {step for step, name in rows if name == "validation/loss"} == {2, 4, 6}

    for run in wandb_records(run_dir, "run"):
        given = run["config"]["update"]
        assert given["optimizer/learning_rate"] == config.optimizer.learning_rate
        assert not [key for key, value in given.items() if isinstance(value, dict) and value]
        assert run["run_group"] == run_id
    (table,) = run_dir.glob("wandb/latest-run/files/media/table/preview_table_*.json")
    content = json.loads(table.read_text())
    rows_of = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [row["prompt"] for row in rows_of] == config.preview.prompts
    summary: dict[str, float] = {}
    for record in wandb_records(run_dir, "summary"):
        summary |= record["update"]
    errors = []
    for row in rows_of:
        assert (row["step"], row["seed"]) == (6, 0)
        target = luminance_target(row["prompt"])
        assert row["target"] == (target and target.value)
        if target:
            assert row["error"] == pytest.approx(abs(row["luminance"] - target.value))
            errors.append(row["error"])
    assert summary["black_point/error"] == pytest.approx(sum(errors) / len(errors))
    assert summary["black_point/black"] == pytest.approx(rows_of[0]["luminance"])


@pytest.mark.slow
def test_artifacts_and_what_is_made_of_a_checkpoint_name_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    for file in ("export/model_index.json", "export/unet/weights", "checkpoints/step_6.ckpt"):
        (run_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / file).write_text(file)
    settings = {"wandb.enabled": True, "wandb.artifacts": "all", "wandb.project": "ours"}
    config = tiny_config(run_dir, Path("base"), Path("shards"), **settings)
    (run_dir / "config.yaml").write_text("wandb: {project: ours}\n")
    monkeypatch.chdir(tmp_path)
    send_artifacts(config, Path("run"))
    identity = (run_dir / "wandb" / "run_id").read_text()
    sent = {record["name"]: record for record in wandb_records(run_dir, "artifact")}
    assert {name: record["type"] for name, record in sent.items()} == {
        f"{identity}-export": "model",
        f"{identity}-step_6": "checkpoint",
    }
    for record in sent.values():
        assert record["run_id"] == identity
        assert json.loads(record["metadata"])["step"] == config.trainer.max_steps
        for entry in record["manifest"]["contents"]:  # as they lie: no copy, from anywhere
            assert Path(entry["local_path"]).is_relative_to(run_dir)
    assert f"step-{config.trainer.max_steps}" in sent[f"{identity}-export"]["aliases"]

    origin = {"run_id": identity, "project": "ours", "run_dir": str(run_dir)}
    for place in ("", "export", "checkpoints/step_6.ckpt"):
        assert trained_by(run_dir / place) == origin
        cell = Cell("searched", settings={"search.checkpoint": str(run_dir / place)})
        assert origin_of(cell) == origin
    assert trained_by("a-hub/model") == trained_by(None) == {}
    config_of_search = {"checkpoint": str(run_dir), "verifiers": {"black": {"weight": 2.0}}}
    start_run(WandbConfig(project="ours"), tmp_path / "found", config_of_search).finish()
    (run,) = wandb_records(tmp_path / "found", "run")
    assert run["run_group"] == identity != run["run_id"]
    given = run["config"]["update"]
    assert {key: given[f"trained_by/{key}"] for key in origin} == origin
    assert given["verifiers/black/weight"] == 2.0


def test_where_wandb_answers_the_export_is_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "wandb").mkdir(parents=True)
    (run_dir / "wandb" / "run_id").write_text("abcd1234")
    (run_dir / "config.yaml").write_text("wandb: {project: ours}\n")
    run = MagicMock()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config = {"evaluate.checkpoint": str(run_dir)}
    assert start_run(WandbConfig(), tmp_path / "out", config) is run
    run.use_artifact.assert_not_called()
    asked = WandbConfig(artifacts="exports")
    start_run(asked, tmp_path / "out", config)
    run.use_artifact.assert_called_once_with("ours/abcd1234-export:latest")
    run.use_artifact.side_effect = ValueError("not\nfound")
    assert start_run(asked, tmp_path / "out", config) is run
    assert "has no artifact ours/abcd1234-export:latest (not found)" in capsys.readouterr().err


def write_metrics(run_dir: Path, steps: range) -> None:
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("".join(f"{step},train/loss,0.5\n" for step in steps))


def test_what_was_sent_is_known_after_any_number_of_kills(tmp_path: Path) -> None:
    def start(resume_step: int) -> set[int]:
        sent = sent_rows(tmp_path, resume_step)
        drop_rows_after(tmp_path / "metrics.csv", resume_step)
        return {step for step, _ in sent}

    assert start(0) == set()
    write_metrics(tmp_path, range(1, 20))
    assert start(10) == set()  # wandb was not used so far
    (tmp_path / "wandb").mkdir()
    write_metrics(tmp_path, range(11, 20))
    assert start(10) == set(range(11, 20))
    write_metrics(tmp_path, range(11, 16))
    assert start(10) == set(range(11, 20))
    assert start(10) == set(range(11, 20))  # killed before its first step
    assert start(5) == set(range(6, 20))  # the checkpoint of step 10 is damaged
    write_metrics(tmp_path, range(6, 25))
    assert start(20) == set(range(21, 25))
    (tmp_path / "wandb/sent.json").write_text("")
    assert start(20) == set()


def test_a_run_id_is_whole_or_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda source, target: kill())
        with pytest.raises(Killed):
            run_id(tmp_path)
    assert not (tmp_path / "wandb/run_id").exists()
    (tmp_path / "wandb/run_id").write_text("")
    first = run_id(tmp_path)
    assert len(first) == 8
    assert run_id(tmp_path) == first == (tmp_path / "wandb/run_id").read_text()


def test_an_answer_that_does_not_come_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = []

    def init(**arguments: Any) -> MagicMock:
        starts.append((arguments["mode"], arguments["id"]))
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")
        return MagicMock()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb_logger(tiny_config(tmp_path, tmp_path, tmp_path), tmp_path)
    run_id = (tmp_path / "wandb/run_id").read_text()
    assert starts == [("online", run_id), ("offline", run_id)]
    (told,) = capsys.readouterr().err.splitlines()
    assert "CommError: Run initialization has timed out after 90.0 sec." in told
    assert "offline" in told and "wandb sync" in told


@pytest.mark.slow
def test_without_a_network_the_run_goes_on_offline_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()  # what has read the environment before
    logger = wandb_logger(tiny_config(tmp_path, tmp_path, tmp_path), tmp_path)
    logger.log_metrics({"train/loss": 0.5}, 1)
    finish(logger)
    wandb.teardown()
    run_id = (tmp_path / "wandb/run_id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) == 1
    assert wandb_rows(tmp_path) == [(1, "train/loss")]


@pytest.mark.parametrize("verb", ["train", "search", "report"])
@pytest.mark.parametrize(
    ("project", "reason"),
    [
        ("team/zero-snr", "holds /, which wandb does not take"),
        ("a?b%c", "holds % \\?, which wandb"),
        ("x" * 129, "has 129 characters, and wandb takes 1 to 128"),
        ("", "has 0 characters"),
    ],
)
def test_projects_that_wandb_refuses_are_refused_first(
    verb: str, project: str, reason: str, tmp_path: Path, capsys
) -> None:
    given = {
        "train": ["checkpoint=c", "data.shards=s", f"run_dir={tmp_path}"],
        "search": ["checkpoint=c", "prompts=a", "budget_nfe=9", "verifiers.a.kind=luminance",
                   f"output={tmp_path / 'out'}"],
        "report": [f"run_dir={tmp_path}"],
    }[verb]  # fmt: skip
    assert main([verb, *given, "wandb.enabled=true", f"wandb.project={project}"]) == 2
    error = capsys.readouterr().err
    assert re.search(f"wandb.project=.*{reason}.*choose another name", error), error
    assert list(tmp_path.iterdir()) == []
    WandbConfig(enabled=False, project=project)  # nothing is sent: nothing to refuse
