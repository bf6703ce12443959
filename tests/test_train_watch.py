"""Laws of what a run measures beside its loss: by SNR, weights, waiting, memory, black point."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.batches import TrainingBatches
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.prompts.brightness_target import (
    LuminanceTarget,
    luminance_target,
    prompt_slugs,
)
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.metrics import CsvMetrics
from blackpoint.train.callbacks.previews import black_point, measure
from blackpoint.train.callbacks.snr_bins import snr_bins, totals_by_bin
from blackpoint.train.callbacks.watch import FETCH, LoaderClock
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import drop_rows_after, read_metrics, rows_after
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config

SLEEP_S = 0.15
PROMPTS = ["a solid black background", "a red one", "a red one on a white background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    make_tiny_pipeline(folder / "pipeline")
    make_tiny_shards(folder / "images")
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run of 4 steps whose loader takes its time."""
    original = TrainingBatches.__iter__

    def slowly(self: TrainingBatches) -> Iterator[Any]:
        for batch in original(self):
            time.sleep(SLEEP_S)
            yield batch

    overrides = {
        "trainer.max_steps": 4,
        "trainer.checkpoint_every_steps": 4,
        "watch.weights_every_steps": 2,
        "preview.every_steps": 2,
        "preview.prompts": PROMPTS,
        "preview.num_steps": 2,
        "preview.num_images": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        patch.setattr(TrainingBatches, "__iter__", slowly)
        config = tiny_config(
            folder / "run", folder / "pipeline", folder / "images" / "shards", **overrides
        )
        assert blackpoint.train.run.fit(config) == 0
    return folder / "run"


def test_loss_by_snr_lies_around_the_loss(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.csv")
    bins = {name: dict(rows) for name, rows in metrics.items() if name.startswith("train/loss_")}
    assert set(bins) <= {f"train/loss_{name}" for name in snr_bins(zero_snr())}
    for step, loss in metrics["train/loss"]:
        own = [rows[step] for rows in bins.values() if step in rows]
        assert min(own) <= loss * (1 + 1e-5) and loss <= max(own) * (1 + 1e-5)
    assert "train/objective" not in metrics  # without weights it is the loss


def test_weight_norms_and_ema_distance_are_those_of_the_checkpoint(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.csv")
    saved = torch.load(run_dir / "checkpoints" / "step_00000004.ckpt", weights_only=True)
    weights = {name: value.double() for name, value in saved["current_model_state"].items()}
    averages = {name: value.double() for name, value in saved["state_dict"].items()}

    def norm(tensors: list[torch.Tensor]) -> float:
        return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()

    whole = norm(list(weights.values()))
    assert [step for step, _ in metrics["weights/norm"]] == [2, 4]
    assert metrics["weights/norm"][-1][1] == pytest.approx(whole, rel=1e-5)
    middle = norm([value for name, value in weights.items() if name.startswith("unet.mid_block.")])
    assert metrics["weights/norm_mid_block"][-1][1] == pytest.approx(middle, rel=1e-5)
    distance = norm([averages[name] - weights[name] for name in weights]) / whole
    assert metrics["weights/ema_distance"][-1][1] == pytest.approx(distance, rel=1e-3)


def test_waiting_for_data_is_measured(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.csv")
    speed, share = dict(metrics["train/images_per_s"]), dict(metrics["train/data_wait_share"])
    for step in (2, 3, 4):
        seconds = 4 / speed[step]  # 4 images a step, a row each
        assert SLEEP_S * 0.98 <= share[step] * seconds <= seconds


def test_memory_is_logged_with_every_row(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.csv")
    peaks = [value for _, value in metrics["memory/process_peak_gb"]]
    assert len(peaks) == 4 and peaks[0] > 0.05 and peaks == sorted(peaks)


def test_previews_log_their_luminance(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.csv")
    for slug in prompt_slugs(PROMPTS):
        for name in (f"preview/luminance_{slug}", f"preview/border_luminance_{slug}"):
            assert [step for step, _ in metrics[name]] == [0, 2, 4]
    assert [step for step, _ in metrics["preview/luminance_error"]] == [0, 2, 4]


def test_the_first_preview_is_the_base_by_its_own_process(folder: Path, run_dir: Path) -> None:
    base = DiffusionModel.load(folder / "pipeline")
    assert base.process.prediction_type == "epsilon" and base.process.timestep_spacing == "leading"
    seeds = [seed for _ in PROMPTS for seed in range(2)]
    images = base.sample(
        [prompt for prompt in PROMPTS for _ in range(2)],
        seeds=seeds,
        num_steps=2,
        guidance_scale=7.5,
        guidance_rescale=0.7,
        height=16,
        width=16,
    )
    expected, _, _ = measure(images, PROMPTS)
    metrics = read_metrics(run_dir / "metrics.csv")
    found = {name: dict(metrics[name])[0] for name in expected}
    assert_close(found, expected, rtol=0, atol=1e-4)  # the contract of images, any batch
    assert (run_dir / "previews" / "step_00000000.png").is_file()


def test_a_start_from_step_0_measures_the_base_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,name,value\n0,preview/luminance_error,0.5\n1,train/loss,1\n")
    assert rows_after(path, 0) == {(0, "preview/luminance_error"), (1, "train/loss")}
    drop_rows_after(path, 0)
    assert read_metrics(path) == {}


def test_rows_of_every_name_are_dropped_beyond_the_step(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    whole = (run_dir / "metrics.csv").read_bytes()
    path.write_bytes(whole + b"5,preview/luminance_a_solid_bl")  # killed within a line
    before = read_metrics(path)
    assert before == read_metrics(run_dir / "metrics.csv")
    drop_rows_after(path, 3)
    kept = {name: [row for row in rows if row[0] <= 3] for name, rows in before.items()}
    assert read_metrics(path) == {name: rows for name, rows in kept.items() if rows}


def test_metrics_drop_what_a_kill_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvMetrics(path)
    for step in range(1, 6):
        logger.log_metrics({"train/loss": 1 / step, "train/norm": 2.0}, step)
    with path.open("a") as file:
        file.write("6,train/lo")  # killed in the middle of a line
    resumed = CsvMetrics(path, resume_step=3)
    resumed.log_metrics({"train/loss": 0.25}, 4)
    assert path.read_text().splitlines() == [
        "step,name,value",
        "1,train/loss,1",
        "1,train/norm,2",
        "2,train/loss,0.5",
        "2,train/norm,2",
        "3,train/loss,0.33333333",
        "3,train/norm,2",
        "4,train/loss,0.25",
    ]


class WithoutFloat64(torch.Tensor):
    """Stands in for a tensor on Apple's MPS until it is on the CPU."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_a_device_without_float64_is_not_given_any(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce(self: Any, tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        assert tensor.dtype != torch.float64
        return tensor

    original = FineTuner.losses
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    monkeypatch.setattr(
        FineTuner, "losses", lambda self, *a: original(self, *a).as_subclass(WithoutFloat64)
    )
    shards = folder / "images" / "shards"
    overrides = {
        "trainer.max_steps": 1,
        "trainer.validate_every_steps": 1,
        "data.validation_shards": str(shards),
    }
    config = tiny_config(tmp_path / "run", folder / "pipeline", shards, **overrides)
    assert blackpoint.train.run.fit(config) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    assert "validation/loss" in metrics
    assert any(name.startswith("train/loss_") for name in metrics)


def zero_snr() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear().zero_terminal_snr()


def test_totals_by_bin_partition_the_samples() -> None:
    schedule = zero_snr()
    t = torch.arange(schedule.num_steps)
    totals = totals_by_bin(schedule, t, torch.ones(len(t)))
    sizes = [float(high - low) for low, high in snr_bins(schedule).values()]
    assert_close(totals, torch.tensor([sizes, sizes], dtype=torch.float64))
    last = totals_by_bin(schedule, t[-1:], torch.tensor([3.0]))
    assert last[:, -1].tolist() == [3.0, 1.0] and last.sum() == 4


def test_clock_adds_up_only_the_fetching() -> None:
    clock = LoaderClock()
    with clock.profile("[Callback]Watch.on_train_batch_end"):
        time.sleep(0.01)
    assert clock.take() == 0
    with clock.profile("[_TrainingEpochLoop]" + FETCH):
        time.sleep(0.01)
    assert clock.take() >= 0.01
    assert clock.take() == 0


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("a solid black background", LuminanceTarget(0, "image")),
        ("Solid white.", LuminanceTarget(1, "image")),
        ("a red three on a dark gray background", LuminanceTarget(0.25, "border")),
        ("a cat on a plain light grey background", LuminanceTarget(0.75, "border")),
        ("a solid black cat", None),
        ("a photo of a bird on snow", None),
        ("a white eight", None),
        ("", None),
    ],
)
def test_prompts_that_fix_luminance(prompt: str, target: LuminanceTarget | None) -> None:
    assert luminance_target(prompt) == target


def test_slugs_are_distinct_and_plain() -> None:
    prompts = ["a red one", "A red, one!", "", "\u9ed2\u3044\u732b", "error", "x" * 200]
    prompts += ["one 8", "one", "one"]
    slugs = prompt_slugs(prompts)
    assert len(set(slugs)) == len(prompts)
    assert all(slug.replace("_", "").isalnum() and slug.isascii() for slug in slugs)
    assert "error" not in slugs and max(map(len, slugs)) <= 66


def test_luminance_of_previews_against_their_prompts() -> None:
    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    framed = white.clone()
    framed[:, 2:-2, 2:-2] = 0
    images = torch.stack([black, white, black, black, framed, framed])
    metrics, captions, measured = measure(images, PROMPTS)
    assert metrics == pytest.approx(
        {
            "preview/luminance_a_solid_black_background": 0.5,
            "preview/border_luminance_a_solid_black_background": 0.5,
            "preview/luminance_a_red_one": 0,
            "preview/border_luminance_a_red_one": 0,
            "preview/luminance_a_red_one_on_a_white_background": 0.75,
            "preview/border_luminance_a_red_one_on_a_white_background": 1,
            "preview/luminance_error": 0.25,
        },
        abs=1e-5,
    )
    assert captions[0] == "a solid black background: image luminance 0.500, wanted 0"
    assert captions[1] == "a red one: image luminance 0.000"
    assert captions[2].endswith("border luminance 1.000, wanted 1")
    assert [one.seed for one in measured] == [0, 1] * 3
    assert [one.target for one in measured] == [0, 0, None, None, 1, 1]
    assert [one.error for one in measured][:4] == pytest.approx([0, 1, None, None], abs=1e-5)
    numbers = {"black_point/black": 0.5, "black_point/white": 1, "black_point/error": 0.25}
    assert black_point(measured) == pytest.approx(numbers, abs=1e-5)
    assert black_point(measured[2:4]) == {}


def test_a_negative_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"watch\.weights_every_steps=-1"):
        tiny_config(tmp_path, tmp_path, tmp_path, **{"watch.weights_every_steps": -1})
