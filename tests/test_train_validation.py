"""Laws of the validation loss: of v whatever the network predicts."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.sampling.prediction import to_eps, to_x0
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.snr_bins import snr_bins
from blackpoint.train.callbacks.validation import ValidationLoss
from blackpoint.train.draws import draw_validation
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.tiny_run import make_tiny_shards, tiny_config, tiny_tuner

UNSOUND: dict[str, Any] = {"loss.prediction_type": "epsilon", "allow_unsound": True}
NOT_ZERO_SNR: dict[str, Any] = {
    "schedule.zero_terminal_snr": False,
    "schedule.timestep_spacing": "leading",
}


def batches(count: int = 6, size: int = 10) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (size, 3, 16, 16), generator=generator).byte(),
            "caption": ["a black background"] * size,
            "key": [str(index) for index in range(size)],
            "index": torch.arange(number * size, (number + 1) * size),
            "replaced": 0,
        }
        for number in range(count)
    ]


def measured(module: FineTuner) -> dict[str, float]:
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(account=lambda replaced, training: None),
        precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext),
        world_size=1,
    )
    callback = ValidationLoss(1, None, None)  # type: ignore[arg-type]
    callback._loader = batches()
    return callback.measure(trainer, module)


def with_common_v(module: FineTuner, monkeypatch: pytest.MonkeyPatch) -> FineTuner:
    """Makes the network say, in what it predicts, that v is half of what it sees."""
    process = module.model.process

    def network(x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.schedule.at(t))
        v = 0.5 * x_t
        match process.prediction_type:
            case "epsilon":
                return to_eps("v_prediction", v, x_t, alpha, sigma)
            case "sample":
                return to_x0("v_prediction", v, x_t, alpha, sigma)
        return v

    monkeypatch.setattr(module.model, "network", network)
    return module


@pytest.mark.parametrize(
    ("output", "process"),
    [("epsilon", NOT_ZERO_SNR), ("sample", NOT_ZERO_SNR), ("sample", {})],
    ids=["epsilon", "sample", "sample at zero SNR"],
)
def test_one_prediction_has_one_validation_loss_whatever_it_is_told_in(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, output: str, process: dict[str, Any]
) -> None:
    """To 1e-3: float32 rounds an error that is alpha or sigma, at least .029, times that of v."""
    of_v = measured(with_common_v(tiny_tuner(pipeline, **process), monkeypatch))
    told: dict[str, Any] = process | {"loss.prediction_type": output}
    of_other = measured(with_common_v(tiny_tuner(pipeline, **told), monkeypatch))
    own = of_other.pop(f"validation/{output}_loss")
    assert of_other.keys() == of_v.keys() and "validation/loss_terminal" in of_v
    assert of_other == pytest.approx(of_v, rel=1e-3)
    assert own < 0.8 * of_v["validation/loss"]  # alpha^2 and sigma^2 are below 1


def test_an_eps_model_at_zero_snr_has_no_v_loss_at_the_last_timestep(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At alpha = 0 no eps determines v. To 1e-2: at T - 2 alpha is 4.4e-4."""
    of_v = measured(with_common_v(tiny_tuner(pipeline), monkeypatch))
    found = measured(with_common_v(tiny_tuner(pipeline, **UNSOUND), monkeypatch))
    assert "validation/loss_terminal" not in found
    ranges = {name: x for name, x in of_v.items() if "_log_snr_" in name}
    assert {name: found[name] for name in ranges} == pytest.approx(ranges, rel=1e-2)
    bins = snr_bins(NoiseSchedule.scaled_linear().zero_terminal_snr())
    shares = {name: high - low for name, (low, high) in bins.items() if name != "terminal"}
    mean = sum(found[f"validation/loss_{name}"] * n for name, n in shares.items()) / 999
    assert found["validation/loss"] == pytest.approx(mean, rel=1e-12)
    assert found["validation/epsilon_loss"] > 0


def test_the_validation_loss_of_v_is_the_mean_of_each_range_to_the_bit(pipeline: Path) -> None:
    module = tiny_tuner(pipeline)
    metrics = measured(module)
    bins = snr_bins(module.model.process.schedule)
    ranges = list(bins.values())
    sums, counts = torch.zeros(2, len(ranges), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches():
            which = [index % len(ranges) for index in batch["index"].tolist()]
            chosen = [ranges[row] for row in which]
            draws = draw_validation(0, batch["index"].tolist(), chosen, (4, 8, 8))
            losses = module.eval().losses(batch, draws).double()
            for row, loss in zip(which, losses, strict=True):
                sums[row] += loss
                counts[row] += 1
    means = (sums / counts).tolist()
    expected = {f"validation/loss_{name}": mean for name, mean in zip(bins, means, strict=True)}
    shares = [high - low for low, high in ranges]
    total = sum(mean * share for mean, share in zip(means, shares, strict=True))
    assert metrics == expected | {"validation/loss": total / sum(shares)}


def test_the_best_checkpoint_is_chosen_by_the_error_of_the_networks_own_output(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the best of a run that began when there was no other loss stays comparable."""
    shards = make_tiny_shards(tmp_path / "images")
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    options: dict[str, Any] = NOT_ZERO_SNR | {
        "loss.prediction_type": "epsilon",
        "data.validation_shards": str(shards),
        "trainer.max_steps": 2,
        "trainer.validate_every_steps": 1,
        "trainer.checkpoint_every_steps": 1,
    }
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **options)) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    own = dict(metrics["validation/epsilon_loss"])
    assert best["step"] == min(own, key=lambda step: own[step])
    assert_close(best["validation_loss"], own[best["step"]], rtol=1e-6, atol=0)
    assert own[2] < dict(metrics["validation/loss"])[2]
