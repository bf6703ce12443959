"""A step that is not finite changes nothing, stops the run when next looked at, and is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import blackpoint.train.run
from blackpoint.data.files.errors import RunFailed
from blackpoint.train.module import FineTuner
from blackpoint.train.optimizer import skip_unless_finite
from tests.speed_stand_ins import EightBitStandIn, install
from tests.tiny_run import tiny_config

LATE = {"trainer.log_every_steps": 100, "trainer.validate_every_steps": 0}
"""Looks at the last step alone, or where weights are saved."""


class Record(Callback):
    """Copies weights and optimizer state after every step, by step; notes the samples."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.state: dict[int, Tensor] = {}
        self.keys: dict[int, list[str]] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.weights[step] = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        state = trainer.optimizers[0].state.values()
        parts = [value.flatten() for values in state for value in values.values()]
        self.state[step] = torch.cat(parts).clone() if parts else torch.empty(0)
        self.keys.setdefault(step, []).extend(batch["key"])


def train(folder: Path, pipeline: Path, shards: Path, *more: Callback, **options: Any) -> Record:
    """Trains 6 steps, which fails at the last; returns the record of five, and the `error`."""
    record = Record()
    values = LATE | {"trainer.checkpoint_every_steps": 100} | options
    config = tiny_config(folder / "run", pipeline, shards, **values)
    with pytest.raises(RunFailed) as caught:
        blackpoint.train.run.train(config, folder / "run", 0, watchers=[*more, record])
    assert not list((folder / "run" / "checkpoints").glob("*"))
    record.error = str(caught.value)  # type: ignore[attr-defined]
    return record


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("value", [torch.nan, 1e30], ids=["NaN", "overflow"])
def test_a_loss_that_is_not_finite_changes_no_weight(
    value: float,
    name: str,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1e30 is finite, as is its gradient, but its square is not. Other optimizers than AdamW go on
    by their moments, with finite weights."""
    install(monkeypatch, "bitsandbytes.optim", AdamW8bit=EightBitStandIn)
    original = FineTuner.predict

    def predict(self: FineTuner, batch: Any, draws: Any) -> tuple[Tensor, Tensor]:
        output, target = original(self, batch, draws)
        if self.global_step == 3:
            target[2, 0, 0, 0] = value
        return output, target

    monkeypatch.setattr(FineTuner, "predict", predict)
    record = train(tmp_path, pipeline, shards, **{"optimizer.name": name})
    error = record.error  # type: ignore[attr-defined]
    assert "the loss of step 4 is not finite for 1 of 4 samples" in error
    assert f"batch: {record.keys[4][2]}; no checkpoint" in error
    assert sorted(record.weights) == [1, 2, 3, 4, 5]
    assert all(weights.isfinite().all() for weights in record.weights.values())
    assert not torch.equal(record.weights[5], record.weights[4])
    if name == "adamw":
        assert torch.equal(record.weights[4], record.weights[3])
        assert torch.equal(record.state[4], record.state[3])


class Overflow(Callback):
    """Makes an element of the gradient of one step infinite."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            pl_module.unet.conv_in.weight.grad[0, 0, 0, 0] = torch.inf


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named_with_the_samples_of_its_step(
    clip: float, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """When the last step is done; of two batches each."""
    options = {"trainer.gradient_clip": clip, "trainer.accumulate_grad_batches": 2}
    record = train(tmp_path, pipeline, shards, Overflow(), **options, batch_size=2)
    assert torch.equal(record.weights[2], record.weights[1])
    assert record.weights[5].isfinite().all()
    error = record.error  # type: ignore[attr-defined]
    assert "the gradient of step 2 is not finite, though its loss is" in error
    # The first batch of a step ends before the step does.
    samples = [*record.keys[1][-2:], *record.keys[2][:2]]
    assert f"batch: {', '.join(samples)}; no checkpoint" in error


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", [torch.nan, torch.inf, 2.0])
def test_what_a_step_is_left_out_by(norm: float, fused: bool) -> None:
    """Plain SGD has no moments: a gradient of 0 leaves it where it is."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = (
        torch.optim.AdamW([weight], lr=0.1, fused=True)
        if fused
        else torch.optim.SGD([weight], lr=0.1)
    )
    weight.grad = torch.tensor([1.0, norm, -1.0])
    skip_unless_finite(optimizer, torch.tensor(norm))
    optimizer.step()
    assert torch.equal(weight, torch.ones(3)) == (norm != 2.0)
    assert weight.isfinite().all()
    weight.grad = torch.ones(3)
    skip_unless_finite(optimizer, torch.tensor(1.0))
    optimizer.step()
    assert (weight < 1).any()
