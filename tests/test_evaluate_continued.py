"""Evaluations that go on: networks that come and go, more pictures, corrected commands."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation import rows as metrics_rows
from blackpoint.sampling.evaluation.metrics import scores, set_models
from blackpoint.sampling.evaluation.rows import read_images, read_rows, write_rows
from blackpoint.sampling.evaluation.summary import read_summary
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.scripts.cli import main
from tests.evaluations import (
    arguments,
    evaluate,
    metric,
    numbers,
    with_sets,
    write_prompts,
    write_reference,
)
from tests.pixel_models import pixel_model

PAINT = "blackpoint.sampling.evaluation.generate.ImageGenerator.generate"
BRIGHT = ["verifiers.bright.kind=luminance", "verifiers.bright.target=1"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "real")


def lose(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes these verifiers, or every network of sets (""), impossible to load."""
    load_verifiers, load_set_model = scores.load_verifiers, set_models.load_set_model

    def verifiers(configs: dict[str, Any], *rest: Any) -> Any:
        if configs.keys() & set(names):
            raise UserError("its weights are gone")
        return load_verifiers(configs, *rest)

    def sets(*given: Any) -> Any:
        if "" in names:
            raise UserError("its weights are gone")
        return load_set_model(*given)

    patch.setattr(scores, "load_verifiers", verifiers)
    patch.setattr(set_models, "load_set_model", sets)


def test_what_was_measured_stays_when_its_network_cannot_be_loaded(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "out", *with_sets(reference), *BRIGHT)
    first = evaluate(given)
    with monkeypatch.context() as patch:
        patch.setattr(PAINT, None)
        lose(patch, "dark", "")
        again = evaluate([*given, "verifiers.gray.kind=luminance", "verifiers.gray.target=0.5"])
        assert not again.skipped
        kept = [each for each in again.metrics if each.name != "gray"]
        assert kept == list(first.metrics)
    with monkeypatch.context() as patch:
        patch.setattr(PAINT, None)
        assert numbers(evaluate(given)) == numbers(first)


def test_columns_that_are_not_asked_for_stay(
    pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    first = evaluate(arguments(pipeline, prompts, output, *BRIGHT))
    monkeypatch.setattr(PAINT, None)
    fewer = evaluate(arguments(pipeline, prompts, output))
    assert "bright" not in {each.name for each in fewer.metrics}
    assert all("bright" in row for row in read_images(output))
    monkeypatch.setattr("blackpoint.sampling.evaluation.measures.Measures.measure", None)
    assert numbers(evaluate(arguments(pipeline, prompts, output, *BRIGHT))) == numbers(first)


def test_the_first_process_measures_what_another_cannot(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*with_sets(reference), *BRIGHT]
    one = evaluate(arguments(pipeline, prompts, tmp_path / "one", *given))
    two = arguments(pipeline, prompts, tmp_path / "two", *given)
    with monkeypatch.context() as patch:
        lose(patch, "bright", "")
        with pytest.raises(AssertionError):  # of `evaluate`: only the first process has metrics
            evaluate(two, Task(1, 2))
    assert numbers(evaluate(two, Task(0, 2))) == numbers(one)


def test_a_corrected_command_is_taken_in_the_same_folder(
    pipeline: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "out")
    assert main(["evaluate", *given, "num_steps=2000"]) == 2
    assert "num_steps=2000" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["evaluate", *given]) == 0


def test_names_that_are_no_classes_are_refused_before_anything_is_sampled(
    prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    pixel_model("class").save(tmp_path / "pixels")
    given = arguments(tmp_path / "pixels", prompts, tmp_path / "out")
    assert main(["evaluate", *given]) == 2
    assert "is not one of the" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_more_pictures_are_kept_when_they_are_asked_for_later(
    pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    few = evaluate(arguments(pipeline, prompts, output, "keep_images=3"))
    assert len(list((output / "images").iterdir())) == 3
    many = evaluate(arguments(pipeline, prompts, output, "keep_images=null"))
    assert len(list((output / "images").iterdir())) == 10
    assert all((output / row["file"]).is_file() for row in read_images(output))
    assert numbers(many) == numbers(few)


def test_a_part_of_another_batch_size_takes_no_other_rows_place(
    pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "out")
    with pytest.raises(AssertionError):  # of `evaluate`: images 4 to 7 are left in a part
        evaluate([*given, "keep_images=0"], Task(1, 2))
    smaller = [text.replace("batch_size=4", "batch_size=2") for text in given]
    assert evaluate([*smaller, "keep_images=6"]).num_images == 10
    kept = [row["file"] is not None for row in read_images(tmp_path / "out")]
    assert kept == [True] * 6 + [False] * 4


def test_references_are_measured_once(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [*with_sets(reference), f"reference_cache={tmp_path / 'shared'}"]
    first = evaluate(arguments(pipeline, prompts, tmp_path / "first", *shared))
    with monkeypatch.context() as patch:
        patch.setattr("blackpoint.sampling.evaluation.metrics.reference_set.read_reference", None)
        second = evaluate(arguments(pipeline, prompts, tmp_path / "second", *shared))
        assert numbers(second) == numbers(first) and second.notes == first.notes
    [kept] = (tmp_path / "shared").iterdir()
    kept.write_bytes(b"half of it")
    assert numbers(evaluate(arguments(pipeline, prompts, tmp_path / "first", *shared))) == numbers(
        first
    )
    (reference / "0.png").unlink()
    other = evaluate(arguments(pipeline, prompts, tmp_path / "first", *shared))
    assert numbers(other) != numbers(first) and len(list((tmp_path / "shared").iterdir())) == 2


def test_parts_that_are_joined_meanwhile_are_read_from_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt_index": 0, "image": 0, "luminance": 0.5}
    write_rows(tmp_path / "parts" / "a.parquet", [row], {})
    read = metrics_rows._read

    def joined_first(path: Path, columns: Any) -> Any:
        if path.parent.name == "parts":
            path.rename(tmp_path / "images.parquet")
        return read(path, columns)

    monkeypatch.setattr(metrics_rows, "_read", joined_first)
    assert read_rows(tmp_path) == {(0, 0): row}


def test_a_measured_column_says_by_which_settings(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path
) -> None:
    evaluate(arguments(pipeline, prompts, tmp_path / "out", *with_sets(reference)))
    for name, columns in (("images", {"dark"}), ("features", {"features", "logits"})):
        schema = pq.read_schema(tmp_path / "out" / f"{name}.parquet")
        assert {field.name for field in schema if field.metadata} == columns


def test_memory_is_that_of_the_largest_process(
    pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("blackpoint.sampling.evaluation.image_rows.peak_bytes", lambda device: 99.5e9)
        evaluate(given)
    evaluate([*given, *BRIGHT])
    found = read_summary(tmp_path / "out")
    assert found is not None and found.peak_gb == 99.5
    assert metric(found, "bright").estimate.n == 5
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["peak_gb"] == 99.5


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells the peak there")
def test_memory_is_not_that_of_the_process_that_started_this_one(
    pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ru_maxrss is inherited: a large shell or launcher would be counted."""
    inherited = SimpleNamespace(ru_maxrss=10**12)
    monkeypatch.setattr("resource.getrusage", lambda _: inherited)
    found = evaluate(arguments(pipeline, prompts, tmp_path / "out", "limit=1", "num_images=1"))
    assert 0.05 < found.peak_gb < 1000
