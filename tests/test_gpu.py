"""Every verb on a GPU: skipped where there is none; the same bodies run on the CPU.

What is compared is the same work in float32 on the CPU. TF32 is off where that is asked for; the
draws of training and sampling are the host's in every case.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

import blackpoint.train.run
from blackpoint.sampling.evaluation.rows import read_images
from blackpoint.scripts.cli import main
from blackpoint.train.cluster import device as training_device
from blackpoint.train.records.metrics_file import read_metrics
from tests.pixel_models import pixel_train_config
from tests.test_fake_device import OPTIONS
from tests.tiny_run import Killed, assert_same_run, kill, stop_in_step, tiny_config

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product on a GPU
CPU = pytest.param("cpu", marks=pytest.mark.slow)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
both = pytest.mark.parametrize("device", [CPU, GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
FLOAT32 = {"trainer.tf32": False, "trainer.encoder_dtype": "float32"}
BF16 = {"trainer.precision": "bf16-mixed", "trainer.encoder_dtype": "bfloat16"}
TRAININGS: dict[str, tuple[dict[str, Any], float]] = {
    **{
        name: (options | FLOAT32, 2e-2 if name.startswith("bf16") else 2e-3)
        for name, options in OPTIONS.items()
    },
    "channels last": ({"trainer.channels_last": True, **FLOAT32}, 2e-3),
    "bf16": ({"trainer.channels_last": True, **BF16}, 2e-2),
    "bf16 adapters": ({"lora.rank": 4, **BF16}, 2e-2),
    "16-mixed": ({"trainer.precision": "16-mixed"}, 2e-2),
    "16-mixed, accumulated": (
        {"trainer.precision": "16-mixed", "trainer.accumulate_grad_batches": 2},
        2e-2,
    ),
    "compile": ({"trainer.compile": True, **FLOAT32}, 2e-3),
    "compile, bf16": ({"trainer.compile": True, "trainer.channels_last": True, **BF16}, 2e-2),
    "defaults": ({}, 2e-2),
}
"""Options, and the relative tolerance of losses: of two devices' sums, or of 8 bits of mantissa.
16-mixed: the loss scaler with fused AdamW and clipping."""


def train(
    device: str,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    strategy: Any = "auto",
    exports: bool = False,
) -> list[float]:
    """Trains on a device; returns the losses. The CPU takes fp16 by Lightning's plugin."""
    is_gpu = device == "cuda"

    def trainer(**options: Any) -> Trainer:
        options |= {"accelerator": "gpu" if is_gpu else "cpu", "strategy": strategy}
        if options["precision"] == "16-mixed" and not is_gpu:
            del options["precision"]
            options["plugins"] = [*options["plugins"], MixedPrecision("16-mixed", "cpu")]  # type: ignore[arg-type]
        return Trainer(**options)

    with monkeypatch.context() as patch:
        chosen = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
        patch.setattr(training_device, "training_device", lambda: chosen)
        patch.setattr("blackpoint.train.callbacks.trainer.Trainer", trainer)
        if not is_gpu:
            patch.setattr(training_device, "check_device", lambda config, device: None)
        if not exports:
            patch.setattr(
                blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
            )
        assert blackpoint.train.run.fit(config) == 0
    losses = read_metrics(Path(config.run_dir) / "metrics.csv")["train/loss"]
    return [loss for _, loss in losses]


def two_steps(folder: Path, pipeline: Path, shards: Path, **options: Any) -> Any:
    """Returns the config of a short run that validates, previews and averages."""
    settings = {
        "trainer.max_steps": 2,
        "trainer.validate_every_steps": 2,
        "data.validation_shards": str(shards),
        "preview.every_steps": 2,
        "preview.num_steps": 2,
        "preview.num_images": 1,
    }
    return tiny_config(folder, pipeline, shards, **(settings | options))


@pytest.mark.parametrize(
    ("device", "name"),
    [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in TRAININGS]
    + [
        pytest.param("cpu", name, marks=pytest.mark.slow)
        for name in TRAININGS
        if not name.startswith("compile")
    ],
)
def test_training_gives_the_losses_of_the_cpu(
    name: str,
    device: str,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, tolerance = TRAININGS[name]
    speed = ("trainer.precision", "trainer.compile", "trainer.channels_last")
    plain = {k: v for k, v in options.items() if k not in speed} | FLOAT32
    expected = train("cpu", two_steps(tmp_path / "cpu", pipeline, shards, **plain), monkeypatch)
    config = two_steps(tmp_path / "run", pipeline, shards, **options)
    assert train(device, config, monkeypatch) == pytest.approx(expected, rel=tolerance)
    assert list((tmp_path / "run" / "previews").iterdir())


@both
def test_a_pixel_model_trains_and_exports(
    device: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pixel_train_config(tmp_path / "run", shards, "text", pipeline)
    config.trainer.max_steps = 2
    assert all(np.isfinite(train(device, config, monkeypatch, exports=True)))
    assert (tmp_path / "run" / "export" / "model_index.json").exists()


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_killed_run_equals_an_unbroken_one_to_the_bit(
    precision: str,
    device: str,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With deterministic algorithms, which sum in one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [
            tiny_config(tmp_path / n, pipeline, shards, **{"trainer.precision": precision})
            for n in "ab"
        ]
        train(device, runs[0], monkeypatch)
        with monkeypatch.context() as patch:
            stop_in_step(patch, 4, kill)
            with pytest.raises(Killed):
                train(device, runs[1], monkeypatch)
        train(device, runs[1], monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@both
def test_one_process_of_ddp_equals_a_plain_run(
    device: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NCCL on a GPU, over gloo here."""
    options = {"trainer.max_steps": 2, "trainer.validate_every_steps": 0, **FLOAT32}
    runs = [tiny_config(tmp_path / name, pipeline, shards, **options) for name in "ab"]
    expected = train(device, runs[0], monkeypatch)
    ddp = DDPStrategy(process_group_backend="nccl" if device == "cuda" else "gloo")
    try:
        assert train(device, runs[1], monkeypatch, ddp) == pytest.approx(expected, rel=1e-5)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)  # by Lightning: those who come later would obey them


@both
def test_encoded_shards_train_to_the_same_losses(
    device: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place in ("cpu", device):
        output = tmp_path / f"latents_{len(found)}"
        given = ["data", "encode", f"source={shards}", f"checkpoint={pipeline}", f"output={output}"]
        given += ["resolution=16", "num_workers=0", "num_processes=1", "dtype=float32"]
        given += ["encoder_dtype=float32", "tf32=false", f"device={place}"]
        assert main(given) == 0
        options = {"data.validation_shards": None, "trainer.validate_every_steps": 0, **FLOAT32}
        config = two_steps(tmp_path / f"run_{len(found)}", pipeline, output, **options)
        found.append(train(place, config, monkeypatch))
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def images_of(folder: Path) -> np.ndarray:
    """Returns the pictures in a folder in [0, 1], by name."""
    return np.stack([np.asarray(Image.open(p)) / 255 for p in sorted(folder.glob("*.png"))])


SAMPLINGS = {
    "float32": (["dtype=float32", "tf32=false"], 2 / 255),
    "channels last": (["dtype=float32", "tf32=false", "channels_last=true"], 2 / 255),
    "ancestral": (["dtype=float32", "tf32=false", "sampler=ddim", "eta=1"], 2 / 255),
    "bfloat16": (["dtype=bfloat16"], 0.1),
    "float16": (["dtype=float16"], 0.02),
    "auto": ([], 0.1),
}
"""Arguments, and how far a pixel may be off: two levels of 8 bits, or the rounding of a format."""


@both
@pytest.mark.parametrize("name", SAMPLINGS)
def test_pictures_are_those_of_the_cpu(
    name: str, device: str, pipeline: Path, tmp_path: Path
) -> None:
    options, tolerance = SAMPLINGS[name]
    given = ["sample", f"checkpoint={pipeline}", "prompts=snow", "num_images=3", "num_steps=4"]
    plain = ["dtype=float32", "device=cpu", *(o for o in options if o.startswith(("eta", "sa")))]
    assert main([*given, *plain, f"output={tmp_path / 'cpu'}"]) == 0
    assert main([*given, *options, f"device={device}", f"output={tmp_path / 'out'}"]) == 0
    expected, found = (images_of(tmp_path / n / "images") for n in ("cpu", "out"))
    assert np.abs(found - expected).max() <= tolerance


@on_gpu
def test_compiled_pictures_are_those_of_the_cpu(
    device: str, pipeline: Path, tmp_path: Path
) -> None:
    given = ["sample", f"checkpoint={pipeline}", "prompts=snow", "dtype=float32", "num_steps=4"]
    assert main([*given, "device=cpu", f"output={tmp_path / 'cpu'}"]) == 0
    given += [f"device={device}", "tf32=false", "compile=true"]
    assert main([*given, f"output={tmp_path / 'out'}"]) == 0
    expected, found = (images_of(tmp_path / n / "images") for n in ("cpu", "out"))
    assert np.abs(found - expected).max() <= 2 / 255


ALGORITHMS = ("random", "zero_order", "halving", "fk_steering", "noise_optimisation", "tilt")


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_finds_the_scores_of_the_cpu(
    algorithm: str, device: str, pipeline: Path, tmp_path: Path
) -> None:
    """Scores of the first candidate, which both begin with: later ones follow from choices."""
    scores = []
    for place in ("cpu", device):
        output = tmp_path / str(len(scores))
        given = [f"checkpoint={pipeline}", "prompts=snow", f"output={output}", f"device={place}"]
        given += ["num_steps=2", "budget_nfe=60", f"algorithm={algorithm}", "dtype=float32"]
        given += ["tf32=false", "verifiers.black.kind=luminance", "verifiers.black.target=0"]
        if algorithm in ("fk_steering", "tilt"):
            given += ["ensemble=weighted_sum", "eta=1"]
        assert main(["search", *given]) == 0
        assert (output / "winners.jsonl").read_text()
        with (output / "candidates.jsonl").open() as file:
            scores.append(json.loads(next(file))["scores"]["black"])
    assert scores[1] == pytest.approx(scores[0], abs=2e-3)


@both
def test_an_evaluation_measures_what_the_cpu_measures(
    device: str, pipeline: Path, tmp_path: Path
) -> None:
    measured = []
    for place in ("cpu", device):
        output = tmp_path / str(len(measured))
        given = [f"checkpoint={pipeline}", "prompts=snow", f"output={output}", f"device={place}"]
        given += ["num_images=3", "num_steps=2", "dtype=float32", "tf32=false"]
        given += ["verifiers.black.kind=luminance", "verifiers.black.target=0"]
        assert main(["evaluate", *given]) == 0
        measured.append([row["luminance"] for row in read_images(output)])
    assert len(measured[0]) == 3 and measured[1] == pytest.approx(measured[0], abs=2e-3)


@both
def test_a_run_on_the_device_exports_and_the_export_samples(
    device: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    config = two_steps(run_dir, pipeline, shards, **{"lora.rank": 4})
    train(device, config, monkeypatch, exports=True)
    assert main(["export", f"checkpoint={run_dir}", f"output={tmp_path / 'again'}"]) == 0
    given = ["prompts=snow", "num_steps=2", f"device={device}", f"output={tmp_path / 'out'}"]
    assert main(["sample", f"checkpoint={run_dir / 'export'}", *given]) == 0
