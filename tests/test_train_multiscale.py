"""Laws of the multi-scale loss: the paper's sum, in numpy and in its gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.train.loss import scale_errors, scale_weights, squared_error
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_train_loss import batch_of
from tests.tiny_run import tiny_config, tiny_tuner

FACTORS = [1, 2, 4]


def images(seed: int, size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    return torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(seed))


def in_numpy(output: torch.Tensor, target: torch.Tensor) -> list[np.ndarray]:
    """Pools output and target each by itself, as the paper writes it."""
    found = []
    for p in FACTORS:
        pooled = []
        for each in (output.double().numpy(), target.double().numpy()):
            b, c, h, w = each.shape
            pooled.append(each.reshape(b, c, h // p, p, w // p, p).mean(axis=(3, 5)))
        found.append(((pooled[0] - pooled[1]) ** 2).reshape(len(output), -1).mean(axis=1))
    return found


def test_every_scale_equals_a_direct_computation() -> None:
    output, target = images(0), images(1)
    found = scale_errors(output, target, FACTORS)
    for row, expected in zip(found, in_numpy(output, target), strict=True):
        assert_close(row.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert torch.equal(found[0], squared_error(output, target))


def test_the_gradient_equals_finite_differences() -> None:
    output, target = images(0, (4, 4)), images(1, (4, 4))
    weights = scale_weights(FACTORS, "inverse_resolution")

    def total(x: torch.Tensor) -> torch.Tensor:
        return (weights @ scale_errors(x, target, FACTORS)).mean()

    x = output.clone().requires_grad_()
    total(x).backward()
    step = 1.0  # of a quadratic, central differences are exact; a short step divides rounding
    for place in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 3, 2, 2)]:
        moved = torch.zeros_like(output)
        moved[place] = step
        slope = (total(output + moved) - total(output - moved)) / (2 * step)
        assert_close(x.grad[place], slope, rtol=1e-3, atol=1e-5)


def test_a_scale_weighs_one_over_its_resolution_or_as_much_as_any() -> None:
    assert scale_weights(FACTORS, "inverse_resolution").tolist() == [1, 2, 4]
    assert scale_weights(FACTORS, "uniform").tolist() == [1, 1, 1]


def test_training_minimises_the_weighted_sum_and_logs_each_scale(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    settings = {"loss.pool_factors": [1, 2], "trainer.log_every_steps": 1}
    config = tiny_config(tmp_path / "run", pipeline, shards, **settings)
    assert blackpoint.train.run.fit(config) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    for (_, one), (_, two), (_, plain), (_, total) in zip(
        rows["train/loss_pool_1"],
        rows["train/loss_pool_2"],
        rows["train/loss"],
        rows["train/objective"],
        strict=True,
    ):
        assert plain == one and two < one
        assert total == pytest.approx(one + 2 * two, rel=1e-5)


def test_one_scale_is_the_plain_loss_bit_for_bit(pipeline: Path) -> None:
    batch = batch_of([0, 1, 2])
    plain = tiny_tuner(pipeline).training_step(batch, 0)
    both = tiny_tuner(pipeline, **{"loss.pool_factors": [1, 2]}).training_step(batch, 0)
    assert torch.equal(plain["loss"], plain["losses"].mean())
    assert torch.equal(plain["losses"], both["losses"])
    assert not torch.equal(plain["loss"], both["loss"])


@pytest.mark.parametrize("factors", [[], [2, 4], [1, 1], [1, 4, 2], [0, 1]])
def test_scales_that_make_no_sense_are_refused(factors: list[int]) -> None:
    with pytest.raises(UserError, match="must begin with 1, full size, and rise"):
        LossConfig(pool_factors=factors)


def test_scales_that_do_not_divide_are_refused_before_anything_is_written(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **{"loss.pool_factors": [1, 3]})
    with pytest.raises(UserError, match="3 does not divide latents of"):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


def test_means_of_an_eps_error_are_refused_at_zero_snr() -> None:
    settings = {"loss.pool_factors": [1, 2], "loss.prediction_type": "epsilon"}
    with pytest.raises(UserError, match="sees? nothing at the last timestep"):
        tiny_config(Path("run"), Path("p"), Path("s"), **settings, allow_unsound=True)
