"""The planner against real steps: what is counted to the byte, what is measured within a tenth."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.train.config.config import OptimizerConfig, TrainConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.optimizer import build_optimizer, state_bytes
from blackpoint.train.plan.plan import Planner, planner_of, with_values
from blackpoint.train.plan.step_memory import LiveBytes
from tests.pixel_models import pixel_train_config
from tests.tiny_run import tiny_config
from tests.tiny_sdxl import make_tiny_sdxl

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"trainer.gradient_checkpointing": True},
    "bfloat16": {"trainer.precision": "bf16-mixed"},
    "accumulated": {"trainer.accumulate_grad_batches": 2, "loss.uncertainty": True},
    "one by one": {
        "trainer.precision": "bf16-true",
        "optimizer.fused_backward": True,
        "trainer.gradient_clip": 0.0,
    },
    "adapters": {"lora.rank": 4, "trainer.precision": "bf16-mixed"},
    "dropout": {"dropout.probability": 0.1},
    "adapters' dropout": {"lora.rank": 4, "lora.dropout": 0.1},
}


def test_storages_count_from_their_making_to_their_end() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        _ = known.view(10, 10)
        assert live.now == 4000
        second = first + 1
        assert live.now == live.peak == 8000
        del first
        assert live.now == 8000, "a view holds it"
        del view
        assert (live.now, live.peak) == (4000, 8000)
    assert len(second) == 1000


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_states_of_an_optimizer_are_counted_to_the_byte(name: Any) -> None:
    settings = OptimizerConfig(name=name, learning_rate=1e-3)
    parameters = [Parameter(torch.zeros(shape)) for shape in ((8, 4, 3, 3), (5,), (1,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(parameters, settings)
    optimizer.step()
    for parameter in parameters:
        state = optimizer.state[parameter].values()
        held = sum(value.nbytes for value in state if isinstance(value, Tensor))
        assert state_bytes(settings, parameter) == held


def real_step(config: TrainConfig) -> tuple[FineTuner, int]:
    """Takes forward and backward passes as a run does; returns their peak beside the weights."""
    model = DiffusionModel.load(config.checkpoint or "")
    model.load_encoders()
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    batch = next(iter(images.train_dataloader()))
    tuner = FineTuner(model, config)
    mixed = config.trainer.precision == "bf16-mixed"
    condition = tuner.condition(batch)
    tuner.condition = lambda _: condition  # type: ignore[method-assign]
    x0 = tuner.encode(batch, None)
    tuner.encode = lambda *_: x0.clone()  # type: ignore[method-assign]
    draws = tuner.draws(batch)
    tuner.draws = lambda _: draws  # type: ignore[method-assign]
    for _ in range(config.trainer.accumulate_grad_batches - 1):
        tuner.training_step(batch, 0)["loss"].backward()
    gradients = [p.grad for p in tuner.parameters() if p.grad is not None]
    if config.optimizer.fused_backward:  # as optimizer.OneByOne does, without its update
        for parameter in tuner.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    known = [*model.unet.parameters(), *tuner.parameters(), *gradients]
    with LiveBytes(known) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = tuner.training_step(batch, 0)["loss"]
        loss.backward()
    return tuner, live.peak + sum(g.nbytes for g in gradients)


@pytest.mark.parametrize(
    ("kind", "name"), [("sd", name) for name in OPTIONS] + [("sdxl", "adapters")]
)
def test_a_plan_is_what_a_real_step_holds(
    pipeline: Path, shards: Path, tmp_path: Path, kind: str, name: str
) -> None:
    base = pipeline if kind == "sd" else make_tiny_sdxl(tmp_path / "sdxl")
    config = tiny_config(tmp_path / "run", base, shards, **OPTIONS[name])
    planner = planner_of(config)
    plan = planner.plan(config)
    tuner, peak = real_step(config)
    trained = sum(p.nbytes for p in tuner.parameters())
    frozen = sum(p.nbytes for p in tuner.model.unet.parameters() if not p.requires_grad)
    sizes = {key: size for key, (size, _) in plan.parts.items()}
    assert sizes["trained weights"] == trained
    assert sizes["average"] == 4 * sum(p.numel() for p in tuner.parameters())
    assert sizes.get("frozen weights", 0) == frozen
    assert sizes.get("gradients", 0) == sum(
        p.grad.nbytes for p in tuner.parameters() if p.grad is not None
    )
    passes = planner.step(config).peak
    # Small tensors of the step that a plan does not have: draws, targets, losses.
    assert passes == pytest.approx(peak, rel=0.1)


def test_a_plan_has_room_for_previews(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    values = {"batch_size": 1, "preview.every_steps": 3}
    config = tiny_config(tmp_path / "run", pipeline, shards, **values)
    planned, _ = planner_of(config).plan(config).parts["activations"]
    model = DiffusionModel.load(pipeline)
    model.load_encoders()
    prompts = config.preview.prompts * config.preview.num_images
    with (
        torch.no_grad(),
        LiveBytes(p for m in model.loaded_parts() for p in m.parameters()) as live,
    ):
        model.sample(prompts, seeds=range(len(prompts)), num_steps=1, height=16, width=16)
    assert planned == pytest.approx(live.peak, rel=0.1)


def test_processes_that_share_a_model_hold_their_part(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **{"trainer.devices": 2})
    planner = planner_of(config)
    whole = planner.plan(config).parts
    parts = planner.plan(with_values(config, {"trainer.strategy": "fsdp"})).parts
    for name in ("trained weights", "gradients", "optimizer states", "average"):
        assert parts[name][0] == whole[name][0] // 2
    assert parts["activations"][0] == whole["activations"][0]


def test_norms_in_float32_take_more_on_a_gpu(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    values = OPTIONS["bfloat16"] | {"card_gib": 24.0}
    config = tiny_config(tmp_path / "run", pipeline, shards, **values)
    planner = planner_of(config)
    on_cpu = Planner(planner.model, False, planner.encoded, planner.images)
    assert planner.on_gpu and planner.step(config).peak > on_cpu.step(config).peak


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Plans the miniature's config; with checkpoint=FOLDER of a smaller model."""
    assert main(["train", "configs/tiny_zero_snr.yaml", "plan=true", *words]) == 0
    return capsys.readouterr().out


def test_the_command_prints_a_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    out = plan_of(capsys, f"run_dir={run_dir}", "card_gib=24")
    assert re.search(r"^peak +[\d.]+ +the largest sum$", out, re.M)
    assert "an epoch: 1000 images, 62.5 steps of 16" in out
    assert "it fits a card of 24 GiB" in out and "configs/tiny_zero_snr.yaml" in out
    assert not run_dir.exists()
    assert "warmup_steps" not in out
    shorter = plan_of(capsys, f"run_dir={run_dir}", "trainer.max_steps=20")
    assert "note: optimizer.warmup_steps=50 is no less than trainer.max_steps=20" in shorter


@pytest.mark.slow
def test_it_names_the_keys_that_bring_a_run_under_a_card(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run_dir={tmp_path}", f"checkpoint={pipeline}", "data.shards=nowhere"]
    words += ["batch_size=256", "data.resolution=16"]
    out = plan_of(capsys, *words, "card_gib=1.52")
    assert "can't be read yet" in out
    keys = out.partition("together: ")[2].split(";")[0].split()
    assert "trainer.gradient_checkpointing=true" in keys
    assert "it fits a card of 1.52 GiB" in plan_of(capsys, *words, *keys, "card_gib=1.52")
    assert "nothing brings it under that card" in plan_of(capsys, *words, "card_gib=1.5")


def test_the_text_encoder_of_a_pixel_model_is_planned(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = pixel_train_config(tmp_path / "run", shards, "text", pipeline)
    model = DiffusionModel.load(pipeline)
    model.load_encoders()
    held, _ = planner_of(config).plan(config).parts["encoders"]
    assert held == sum(p.nbytes for p in model.text_encoder.parameters())
