"""`blackpoint evaluate`: rows, metrics, several processes, what is added later, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blackpoint.sampling.evaluation.config import MetricsConfig, not_asked
from blackpoint.sampling.evaluation.rows import finished_keys, read_images, read_rows, write_rows
from blackpoint.sampling.evaluation.summary import read_summary
from blackpoint.sampling.report.results import read_results
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from tests.evaluations import (
    PROMPTS,
    arguments,
    evaluate,
    metric,
    numbers,
    with_sets,
    write_prompts,
    write_reference,
)
from tests.warm_verb import WarmVerb

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "real")


def test_every_metric_has_n_and_an_interval(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    found = evaluate(arguments(pipeline, prompts, output, *with_sets(reference)))
    names = {(each.name, each.group) for each in found.metrics}
    assert {
        ("FID", ""),
        ("KID", ""),
        ("IS", ""),
        ("precision", ""),
        ("recall", ""),
        ("dark", ""),
        ("luminance error", ""),
        ("luminance error", "dark"),
        ("luminance", "bright"),
        ("luminance spread over the references'", "open"),
        ("luminance distance to the references", "open"),
        ("noise-invariance", ""),
    } <= names
    assert all(each.estimate.n > 1 for each in found.metrics)
    assert metric(found, "dark").estimate.n == len(PROMPTS)  # prompts, not images
    assert found.num_images == 10 and found.nfe == 10 * 2 * 2
    assert "1 of 6 references had another size" in " ".join(found.notes)
    rows = read_images(output)
    assert [(row["prompt_index"], row["image"]) for row in rows] == [
        (prompt, image) for prompt in range(5) for image in range(2)
    ]
    assert [row["seed"] for row in rows] == list(range(10))
    mean = np.mean([row["dark"] for row in rows])
    assert metric(found, "dark").estimate.value == pytest.approx(mean)
    for row in rows:  # what is measured is what the file holds
        with Image.open(output / row["file"]) as picture:
            gray = np.asarray(picture, dtype=float) / 255 @ [0.299, 0.587, 0.114]
        assert row["luminance"] == pytest.approx(gray.mean(), abs=1e-5)
    assert pq.read_table(output / "features.parquet").column_names[-2:] == ["features", "logits"]
    assert numbers(read_summary(output) or found) == numbers(found)
    for name in ("metrics.md", "metrics.csv"):
        assert "FID at n = 10; interval at this n" in (output / name).read_text()
    assert "FID at infinite n left out: 5 prompts" in " ".join(found.notes)
    assert len(read_results(output).reference_luminance) == 6
    assert (output / "metrics.csv").read_text().startswith("metric,group,value,low,high,n,unit")


def test_the_same_again_does_nothing_and_a_lost_part_is_made_again(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "out", *with_sets(reference))
    first = evaluate(given)
    with monkeypatch.context() as patch:
        patch.setattr("blackpoint.sampling.evaluation.generate.ImageGenerator.generate", None)
        again = evaluate(given)
        assert numbers(again) == numbers(first) and again.seconds == first.seconds
    rows = read_rows(tmp_path / "out")
    kept = [row for key, row in rows.items() if key not in ((1, 0), (3, 1))]
    schema = pq.read_schema(tmp_path / "out" / "images.parquet")
    columns = {field.name: field.metadata[b"digest"].decode() for field in schema if field.metadata}
    scalars = [{k: v for k, v in r.items() if k not in ("features", "logits")} for r in kept]
    write_rows(tmp_path / "out" / "images.parquet", scalars, columns)
    assert numbers(evaluate(given)) == numbers(first)


def test_a_metric_that_is_added_later_is_measured_on_the_images_that_are_there(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    plain = evaluate(arguments(pipeline, prompts, output))
    more = [*with_sets(reference), "verifiers.bright.kind=luminance", "verifiers.bright.target=1"]
    with monkeypatch.context() as patch:
        patch.setattr("blackpoint.sampling.evaluation.generate.ImageGenerator.generate", None)
        later = evaluate(arguments(pipeline, prompts, output, *more))
    at_once = evaluate(arguments(pipeline, prompts, tmp_path / "once", *more))
    assert numbers(later) == numbers(at_once)
    assert metric(later, "dark") == metric(plain, "dark")
    # Images that were not kept are sampled once more.
    other = evaluate(arguments(pipeline, prompts, tmp_path / "none", "keep_images=0"))
    assert not (tmp_path / "none" / "images").exists()
    resampled = evaluate(arguments(pipeline, prompts, tmp_path / "none", "keep_images=0", *more))
    assert numbers(resampled) == numbers(at_once) and numbers(other) == numbers(plain)


def test_a_verifier_with_other_settings_is_measured_again(
    pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    dark = metric(evaluate(arguments(pipeline, prompts, tmp_path / "out")), "dark")
    given = arguments(pipeline, prompts, tmp_path / "out", "verifiers.dark.target=1")
    bright = metric(evaluate(given), "dark")
    assert bright.estimate.value == pytest.approx(-1 - dark.estimate.value, abs=1e-4)


def test_what_is_missing_is_named_and_the_rest_runs(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path, capsys: Any
) -> None:
    given = arguments(
        pipeline,
        prompts,
        tmp_path / "out",
        "verifiers.clip.kind=clip_score",
        "verifiers.clip.checkpoint=/nowhere",
        f"sets.reference={reference}",
        "sets.inception=/nowhere.pth",
    )
    assert main(["evaluate", *given]) == 0
    text = capsys.readouterr().out
    assert "skipped: clip" in text and "openai/clip-vit-large-patch14" in text
    assert "skipped: sets" in text and "weights-inception-2015-12-05-6726825d.pth" in text
    found = read_summary(tmp_path / "out")
    assert found is not None and metric(found, "dark").estimate.n == 5
    assert not any(each.name == "FID" for each in found.metrics)


@pytest.mark.slow
def test_three_processes_have_the_numbers_of_one(
    pipeline: Path, prompts: Path, reference: Path, tmp_path: Path
) -> None:
    given = arguments(pipeline, prompts, tmp_path / "three", *with_sets(reference))
    one = evaluate(arguments(pipeline, prompts, tmp_path / "one", *with_sets(reference)))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    running = [
        WarmVerb(
            "evaluate",
            *given,
            environment=dict(zip(names, (str(rank), "3", str(rank)), strict=True)),
        )
        for rank in range(3)
    ]
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error
    three = read_summary(tmp_path / "three")
    assert three is not None and not (tmp_path / "three" / "parts").exists()
    assert numbers(three) == numbers(read_summary(tmp_path / "one") or one)


def test_rows_are_merged_by_key_whatever_their_order(tmp_path: Path) -> None:
    columns = {"score": "a1"}
    rows = [
        {"prompt_index": n, "image": 0, "luminance": 0.1 * n, "score": float(n)} for n in (3, 1)
    ]
    write_rows(tmp_path / "parts" / "b.parquet", rows, columns)
    write_rows(tmp_path / "images.parquet", [{"prompt_index": 2, "image": 0, "luminance": 0.5}], {})
    found = read_rows(tmp_path, columns)
    assert {key: row.get("score") for key, row in found.items()} == {
        (1, 0): 1.0,
        (2, 0): None,
        (3, 0): 3.0,
    }
    assert finished_keys(tmp_path, columns) == {(1, 0), (3, 0)}
    stale = read_rows(tmp_path, {"score": "b2"})
    assert "score" not in stale[1, 0] and finished_keys(tmp_path, {"score": "b2"}) == set()


@pytest.mark.parametrize(
    "changes, expected",
    [
        (["sets.classifier.module=tests.tiny_vision:ThreeColors", "limit=1", "num_images=1"],
         "at least two images"),
        (["sets.features.module=tests.tiny_vision:ThreeColors"], "sets.reference"),
        (["num_imges=3"], "did you mean `num_images`"),
        (["verifiers.fid.kind=oracle", "verifiers.fid.metric=is", "verifiers.fid.module=a:b"],
         "does not judge a single image"),
        (["verifiers.seed.kind=luminance"], "kept for another column"),
        (["keep_images=-1"], "keep_images=-1"),
        (["timestep_spacing=leading"], "allow_unsound=true"),
        (["geneval=/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["sets.reference=EMPTY", "sets.features.module=tests.tiny_vision:ThreeColors"],
         "holds 0 pictures"),
        (["study=metric"], "expected metrics"),
        (["study=black_point", "checkpoints.a=x"], "blackpoint evaluate configs/black_point.yaml"),
        (["study=stability", "quality.a.kind=luminance"], "blackpoint sweep configs/stability"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_written(
    pipeline: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: Any,
    changes: list[str],
    expected: str,
) -> None:
    zero_snr = tmp_path / "zero_snr"
    zero_snr.mkdir()
    for part in pipeline.iterdir():
        (zero_snr / part.name).symlink_to(part)
    (zero_snr / "scheduler").unlink()
    (zero_snr / "scheduler").mkdir()
    scheduler = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    scheduler |= {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    (zero_snr / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((pipeline / "model_index.json").read_text())
    (zero_snr / "model_index.json").unlink()
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (zero_snr / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "empty").mkdir()
    changes = [each.replace("EMPTY", str(tmp_path / "empty")) for each in changes]
    output = tmp_path / "out"
    assert main(["evaluate", *arguments(zero_snr, prompts, output, *changes)]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not output.exists()


def test_another_evaluation_is_not_overwritten(
    pipeline: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    evaluate(arguments(pipeline, prompts, tmp_path / "out"))
    assert main(["evaluate", *arguments(pipeline, prompts, tmp_path / "out", "num_steps=3")]) == 2
    assert "num_steps: 2 there, 3 now" in capsys.readouterr().err
    prompts.write_text(prompts.read_text().replace("snow", "sand"))
    assert main(["evaluate", *arguments(pipeline, prompts, tmp_path / "out")]) == 2
    assert "other prompts" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["evaluate", *arguments(pipeline, prompts, tmp_path / "full")]) == 2
    assert "no evaluation" in capsys.readouterr().err


def test_a_broken_range_of_luminance_is_refused_before_anything_is_sampled(
    pipeline: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    prompts.write_text(prompts.read_text().replace("[0.5, 1.0]", "[0.5, 2]"))
    assert main(["evaluate", *arguments(pipeline, prompts, tmp_path / "out")]) == 2
    assert "luminance=[0.5, 2]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_with_other_timesteps_says_so(
    pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    own = evaluate(arguments(pipeline, prompts, tmp_path / "own"))
    given = arguments(pipeline, prompts, tmp_path / "other", "timestep_spacing=linspace")
    other = evaluate(given)
    assert own.notes == () and "timestep_spacing=linspace" in other.notes[0]
    assert numbers(own) != numbers(other)


def test_geneval_scores_stand_beside(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "tag": "counting", "correct": n % 2 == 0} for n in range(4)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(arguments(pipeline, prompts, tmp_path / "out", f"geneval={path}"))
    assert metric(found, "GenEval", "counting").estimate.value == 0.5
    assert any("no images of single_object" in note for note in found.notes)


def test_the_brightness_suite_reads(pipeline: Path, tmp_path: Path) -> None:
    given = arguments(pipeline, ROOT / "configs/prompts/brightness.jsonl", tmp_path / "out")
    found = evaluate([*given, "num_images=1", "batch_size=16"])
    groups = {each.group for each in found.metrics if each.name == "luminance error"}
    assert {"", "solid", "night", "snow"} <= groups
    assert torch.isfinite(torch.tensor(metric(found, "luminance error").estimate.value))


def test_usual_metrics_that_are_not_asked_for_are_named_with_what_to_set() -> None:
    config = MetricsConfig(checkpoint="c", prompts="a", output="o")
    lines = {line.partition(":")[0]: line for line in not_asked(config, [])}
    assert "prompts=configs/prompts/brightness.jsonl" in lines.pop("luminance error")
    assert list(lines) == ["FID, KID, precision, recall", "IS", "CLIP score", "GenEval"]
    settings = [word for line in lines.values() for word in line.split() if "=" in word]
    arguments = [word.rstrip(",") for word in settings]
    asked = load(MetricsConfig, ["checkpoint=c", "prompts=a", "output=o", *arguments])
    assert not [*not_asked(asked, ["luminance error"])]
