"""Laws of options that save memory: rounding at random, steps in the backward pass, Adafactor,
levels that are recomputed, encoders that wait. Those of the average: test_train_ema.py."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.speed import blocks_by_level
from blackpoint.train.config.config import OptimizerConfig
from blackpoint.train.optimizer import OneByOne, build_optimizer, rounded_at_random
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_speed_options import compiling_with
from tests.test_train_processes import start
from tests.tiny_encode import encoded
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    load_checkpoint,
    stop_in_step,
    tiny_config,
    tiny_tuner,
)
from tests.waiting import PATIENCE_S

FUSED = {"optimizer.fused_backward": True, "trainer.gradient_clip": 0.0}
BFLOAT16 = {"trainer.precision": "bf16-true"}
LENGTH = {"trainer.max_steps": 3}
SIGMAS = 6.0
"""How far a mean may be from its law: one in 5e8."""


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("value", [1.0001, 1.0039, -0.7, 3e-3, -2.5e4, 1e-30])
def test_rounding_at_random_takes_a_neighbour_and_keeps_the_mean(value: float) -> None:
    count = 40_000
    rounded = rounded_at_random(torch.full((count,), value), generator()).double()
    exact = torch.tensor(value).double()
    low, high = rounded.unique(sorted=True)
    assert low < exact < high
    below = torch.tensor(value).view(torch.int32) & -(2**16)  # towards 0
    neighbours = {below.view(torch.float32).item(), (below + 2**16).view(torch.float32).item()}
    assert {low.item(), high.item()} == neighbours
    p = (exact - low) / (high - low)
    deviation = (high - low) * math.sqrt(p * (1 - p) / count)
    assert abs(rounded.mean() - exact) < SIGMAS * deviation


def test_rounding_at_random_leaves_what_a_bfloat16_holds_and_what_is_no_number() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert_close(rounded_at_random(exact.float(), generator()), exact, rtol=0, atol=0)
    every_bit = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([math.inf, -math.inf]), every_bit])
    rounded = rounded_at_random(values, generator()).float()
    assert_close(rounded[:2], values[:2], rtol=0, atol=0)
    assert rounded[2:].isnan().all()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_small_updates_are_lost_to_the_nearest_and_kept_at_random(name: str) -> None:
    """Each step is 1e-4, and the nearest bfloat16 below 1 is .0039 away.

    The sum of so many steps, rounded at random, has a variance of at most a quarter of the gap's
    square a step.
    """
    steps, rate, count = 40, 1e-4, 4096
    settings = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0.0)  # type: ignore[arg-type]
    weights = {}
    for rounding in ("float32", "nearest", "stochastic"):
        dtype = torch.float32 if rounding == "float32" else torch.bfloat16
        weight = Parameter(torch.ones(count, dtype=dtype))
        optimizer = build_optimizer([weight], settings)
        if rounding == "stochastic":
            step = iter(range(steps))
            optimizer = OneByOne(optimizer, lambda: next(step))  # noqa: B023
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        weights[rounding] = weight.detach().double()
    assert_close(weights["float32"].mean().item(), 1 - steps * rate, rtol=1e-6, atol=0)
    assert (weights["nearest"] == 1).all()
    allowed = SIGMAS * math.sqrt(steps / 4) * 2**-8 / math.sqrt(count)
    moved = 1 - weights["stochastic"].mean().item()
    assert abs(moved - steps * rate) < allowed < steps * rate


def run(folder: Path, pipeline: Path, shards: Path, **values: Any) -> Path:
    assert blackpoint.train.run.fit(tiny_config(folder, pipeline, shards, **values)) == 0
    return folder


def losses(run_dir: Path) -> list[float]:
    return [loss for _, loss in read_metrics(run_dir / "metrics.csv")["train/loss"]]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="float32"),
        pytest.param(BFLOAT16, id="bf16-true", marks=pytest.mark.slow),
        pytest.param(
            {"optimizer.name": "adafactor", "trainer.gradient_checkpointing": True}, id="adafactor"
        ),
        pytest.param(
            {"loss.uncertainty": True, "lora.rank": 2}, id="adapters", marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_in_the_backward_pass_is_the_same_step(
    options: dict[str, Any], pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """To the bit; the norm of the gradient is summed in another order."""
    values = {"trainer.max_steps": 2, **options}
    after = run(tmp_path / "after", pipeline, shards, **values, **{"trainer.gradient_clip": 0.0})
    within = run(tmp_path / "within", pipeline, shards, **values, **FUSED)
    one, two = load_checkpoint(after, 2), load_checkpoint(within, 2)
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert_close(one[key], two[key], rtol=0, atol=0)
    norms = [read_metrics(d / "metrics.csv")["train/gradient_norm"] for d in (after, within)]
    tolerance = 2**-7 if "trainer.precision" in options else 1e-5
    assert_close(
        [norm for _, norm in norms[0]], [norm for _, norm in norms[1]], rtol=tolerance, atol=0
    )


@pytest.mark.slow
def test_compiled_it_is_the_same_step_too(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    compiled = {"trainer.compile": True, **FUSED, **LENGTH}
    with pytest.MonkeyPatch.context() as patch:
        for _ in compiling_with("aot_eager", patch):
            run(tmp_path / "within", pipeline, shards, **compiled)
    run(tmp_path / "plain", pipeline, shards, **LENGTH, **{"trainer.gradient_clip": 0.0})
    assert_close(losses(tmp_path / "within"), losses(tmp_path / "plain"), rtol=1e-4, atol=0)


def test_one_gradient_is_there_at_a_time_and_the_rate_of_the_step_is_used(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    rates: list[float] = []
    original = OneByOne._step_one

    def spy(self: OneByOne, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        left.append(sum(p.grad is not None for _, p in self._parameters()))
        if number == 0:
            rates.append(group["lr"])
        original(self, number, group, parameter)

    monkeypatch.setattr(OneByOne, "_step_one", spy)
    run(tmp_path / "run", pipeline, shards, **FUSED, **LENGTH)
    assert set(left) == {1}
    assert_close(rates, [1e-3 / 3, 2e-3 / 3, 1e-3], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(BFLOAT16, id="bf16-true"),
        pytest.param(
            BFLOAT16 | FUSED | {"optimizer.name": "adafactor", "ema.every_steps": 2}, id="together"
        ),
    ],
)
def test_a_killed_run_equals_an_unbroken_one(
    options: dict[str, Any], pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    every = {"trainer.checkpoint_every_steps": 1, "trainer.max_steps": 3}
    options = every | {"ema.device": "cpu", **options}
    unbroken = run(tmp_path / "unbroken", pipeline, shards, **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 1, kill)
        with pytest.raises(Killed):
            run(tmp_path / "run", pipeline, shards, **options)
    assert_same_run(run(tmp_path / "run", pipeline, shards, **options), unbroken, step=3)


@pytest.fixture(scope="module")
def half(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16-true that validates, previews and measures its weights on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        looks = {"preview.every_steps": 2, "preview.num_steps": 2, "preview.num_images": 1}
        looks |= {"watch.weights_every_steps": 1, "data.validation_shards": str(shards)}
        looks |= LENGTH
        folder = tmp_path_factory.mktemp("half") / "run"
        return run(folder, pipeline, shards, **BFLOAT16, **looks)


def test_weights_and_states_are_bfloat16_and_the_average_float32(half: Path) -> None:
    saved = load_checkpoint(half, 3)
    assert {tensor.dtype for tensor in saved["current_model_state"].values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in saved["state_dict"].values()} == {torch.float32}
    states = saved["optimizer_states"][0]["state"].values()
    moments = {value.dtype for s in states for name, value in s.items() if name != "step"}
    assert moments == {torch.bfloat16}


def test_looks_at_the_average_leave_it_and_the_weights_alone(
    half: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """The average goes into bfloat16 weights to be looked at, and must not come back from there."""
    blind = {"watch.weights_every_steps": 0, "trainer.validate_every_steps": 0, **LENGTH}
    unseen = load_checkpoint(run(tmp_path / "run", pipeline, shards, **BFLOAT16, **blind), 3)
    seen = load_checkpoint(half, 3)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_close(seen[key], unseen[key], rtol=0, atol=0)


def test_its_checkpoints_are_loaded_and_its_losses_are_those_of_float32(
    half: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """2e-2, as bf16-mixed: products have 8 bits of mantissa."""
    checkpoint, saved = half / "checkpoints" / "step_00000003.ckpt", load_checkpoint(half, 3)
    for weights, key in (("ema", "state_dict"), ("raw", "current_model_state")):
        unet = DiffusionModel.load(checkpoint, weights=weights).unet.state_dict()  # type: ignore[arg-type]
        expected = {name.removeprefix("unet."): t.float() for name, t in saved[key].items()}
        assert_close(dict(unet), expected, rtol=0, atol=0)
    plain = run(tmp_path / "run", pipeline, shards, **LENGTH)
    assert_close(losses(half), losses(plain), rtol=2e-2, atol=0)


def test_losses_targets_and_draws_stay_float32(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tiny_tuner(pipeline, **BFLOAT16)
    seen: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        seen.extend((x.dtype, condition.prompt_embeds.dtype))
        return torch.zeros_like(x)

    monkeypatch.setattr(tuner.model, "network", network)
    batch: dict[str, Any] = {
        "image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        "caption": ["a", "b"],
        "epoch": torch.tensor([0, 0]),
        "index": torch.tensor([0, 1]),
    }
    draws = tuner.draws(batch)
    output, target = tuner.predict(batch, draws)
    assert seen == [torch.bfloat16, torch.bfloat16] and output.dtype == torch.bfloat16
    assert target.dtype == draws.eps.dtype == tuner.losses(batch, draws).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    exact = tiny_tuner(pipeline)
    assert_close(target, exact.predict(batch, draws)[1], rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_ends_a_run_whose_steps_are_in_the_backward_pass(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OneByOne._step_one

    def infinite(self: OneByOne, number: int, group: Any, parameter: Tensor) -> None:
        if calls["step"] == 4 and number == 0:
            self._norms[number] = torch.tensor(math.inf)
        original(self, number, group, parameter)

    calls = {"step": 0}
    monkeypatch.setattr(OneByOne, "_step_one", infinite)
    stop_in_step(monkeypatch, 4, lambda: calls.update(step=4))
    with pytest.raises(RunFailed, match="the gradient of step 5 is not finite"):
        run(tmp_path / "run", pipeline, shards, **FUSED)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003.ckpt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer.gradient_clip": 1.0}, "gradient_clip=1 .*set trainer.gradient_clip=0, or leave"),
        ({"trainer.accumulate_grad_batches": 2}, "set trainer.accumulate_grad_batches=1"),
        ({"trainer.devices": 2}, "2 processes .*trainer.devices=1 trainer.num_nodes=1"),
        ({"trainer.precision": "16-mixed"}, "16-mixed .*use trainer.precision=bf16-mixed"),
    ],
)
def test_what_a_step_in_the_backward_pass_cannot_have_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"fused_backward=true .*{message}"):
        tiny_config(Path("run"), Path("sd"), Path("shards"), **(FUSED | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema.every_steps": 7}, "ema.every_steps=7: must be at most trainer.max_steps=6"),
        ({"ema.every_steps": 0}, "ema.every_steps=0"),
        ({"trainer.gradient_checkpointing_levels": [0]}, r"levels=\[0\]: set trainer.gradient_che"),
    ],
)
def test_options_of_memory_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(Path("run"), Path("sd"), Path("shards"), **values)


def test_levels_alone_are_recomputed_to_the_same_gradients(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    on = {"trainer.gradient_checkpointing": True}
    tuner = tiny_tuner(pipeline, **on, **{"trainer.gradient_checkpointing_levels": [0]})
    for level, block in blocks_by_level(tuner.model.unet):
        flags = {m.gradient_checkpointing for m in block.modules() if hasattr(m, FLAG)}
        assert flags == {level == 0}
    saved = [
        load_checkpoint(run(tmp_path / name, pipeline, shards, **values), 1)
        for name, values in {
            "plain": {"trainer.max_steps": 1},
            "levels": {"trainer.max_steps": 1, **on, "trainer.gradient_checkpointing_levels": [0]},
        }.items()
    ]
    assert_close(saved[1]["optimizer_states"], saved[0]["optimizer_states"], rtol=0, atol=0)
    lacking = on | {"trainer.gradient_checkpointing_levels": [1, 7]}
    with pytest.raises(UserError, match=r"levels=\[1, 7\]: this UNet has the levels 0 to 1"):
        run(tmp_path / "lacking", pipeline, shards, **lacking)
    assert not (tmp_path / "lacking").exists()


FLAG = "gradient_checkpointing"


def test_encoders_that_serve_previews_alone_wait_on_the_cpu(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    original, sample = torch.nn.Module.to, DiffusionModel.sample

    def to(self: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        if type(self).__name__.startswith(("AutoencoderKL", "CLIPText")):
            moves.append(str(arguments[0]))
        return original(self, *arguments, **named)

    def sampled(self: DiffusionModel, *arguments: Any, **named: Any) -> Tensor:
        moves.append("sample")
        return sample(self, *arguments, **named)

    monkeypatch.setattr(DiffusionModel, "sample", sampled)
    # A device that is not the CPU, by its name; the encoders do not compute there.
    monkeypatch.setattr(DiffusionModel, "device", property(lambda self: torch.device("cpu:0")))
    encoded(shards, pipeline, tmp_path / "latents")
    monkeypatch.setattr(torch.nn.Module, "to", to)
    looks = {"preview.every_steps": 1, "preview.num_steps": 1, "preview.num_images": 1}
    values = {"trainer.max_steps": 1, "preview.prompts": ["a"], **looks}
    run(tmp_path / "cached", pipeline, tmp_path / "latents", **values)
    after = moves[moves.index("sample") - 2 :]
    assert after == 2 * ["cpu:0", "cpu:0", "sample", "cpu", "cpu"]  # of the base, and at the end
    assert moves[: moves.index("sample") - 2][-2:] == ["cpu", "cpu"]
    moves.clear()
    run(tmp_path / "images", pipeline, shards, **values)
    assert "cpu" not in moves[moves.index("sample") :]


@pytest.mark.slow
def test_two_processes_round_alike(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    """2e-2, as gradients of half a batch are rounded before they are added."""
    together = start(tmp_path / "run2", pipeline, shards, 6, **BFLOAT16)
    alone = run(tmp_path / "run1", pipeline, shards, **BFLOAT16)
    assert together.wait(PATIENCE_S) == 0
    assert_close(losses(tmp_path / "run2"), losses(alone), rtol=2e-2, atol=0)
