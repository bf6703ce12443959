"""Laws of adapters in training: what is trained, how it starts, what a checkpoint holds of it."""

import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.lora_config import LoraConfig
from blackpoint.train.draws import draw, dropout_seeds
from blackpoint.train.dropout import SampleSeeds
from blackpoint.train.ema import Average
from blackpoint.train.lora import check_base, target_layers, trained_part
from blackpoint.train.module import FineTuner
from blackpoint.train.optimizer import build_optimizer
from blackpoint.train.records.run_identity import unet_digest_in
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    load_checkpoint,
    stop_in_step,
    tiny_config,
    tiny_tuner,
)

LORA: dict[str, Any] = {"lora.rank": 2, "lora.alpha": 1.0}
EVERYTHING = LORA | {"lora.convolutions": True, "lora.dropout": 0.2, "dropout.probability": 0.2}
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}


def without_exports(patch: pytest.MonkeyPatch) -> None:
    """Stands in for the exports of a run, which have their own tests."""
    patch.setattr(blackpoint.train.run, "export", lambda source, output, **options: output.mkdir())
    patch.setattr(blackpoint.train.run, "write_adapters", lambda source, output, weights: None)


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    without_exports(monkeypatch)


@pytest.fixture
def sd15() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5, without memory for weights."""
    with init_empty_weights():
        return UNet2DConditionModel(sample_size=64, **SD15)


def adapters_of(unet: UNet2DConditionModel, **options: Any) -> torch.nn.Module:
    config = LoraConfig(**({"rank": 2} | options))
    return trained_part(unet, config, 0, torch.float32, SampleSeeds())


def batch_of(tuner: FineTuner, size: int = 2) -> dict[str, Any]:
    images = torch.arange(size * 768, dtype=torch.uint8).view(size, 3, 16, 16)
    captions = ["a black night", "a photo of the snow"][:size]
    sample = {"index": torch.arange(size), "epoch": torch.zeros(size, dtype=torch.long)}
    return {"image": images, "caption": captions, **sample}


def losses_of(tuner: FineTuner, rows: slice = slice(None)) -> torch.Tensor:
    batch = {name: values[rows] for name, values in batch_of(tuner).items()}
    epochs, indices = batch["epoch"].tolist(), batch["index"].tolist()
    if tuner.dropout_seeds is not None:
        tuner.dropout_seeds.of_batch = dropout_seeds(0, epochs, indices)
    draws = draw(0, epochs, indices, tuner.latent_shape(batch), 1000)
    return tuner.losses(batch, draws)


def test_sd15_gets_192_adapters_and_278_with_its_convolutions(sd15: UNet2DConditionModel) -> None:
    assert len(target_layers(sd15, LoraConfig(rank=16))) == 192
    assert len(target_layers(sd15, LoraConfig(rank=16, convolutions=True))) == 278


@pytest.mark.parametrize("options", [{}, {"convolutions": True, "dora": True}])
def test_what_is_saved_has_the_names_and_values_of_peft(
    options: dict[str, Any], pipeline: Path
) -> None:
    unet = DiffusionModel.load(pipeline).unet
    saved = adapters_of(unet, **options).state_dict()
    theirs = peft.get_peft_model_state_dict(unet, adapter_name="default")
    assert_close(dict(saved), theirs, rtol=0, atol=0)


def test_a_run_starts_at_its_base_from_the_seed_alone(pipeline: Path) -> None:
    torch.manual_seed(1)
    one = tiny_tuner(pipeline, **LORA)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    two, other = tiny_tuner(pipeline, **LORA), tiny_tuner(pipeline, **LORA, seed=1)
    assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "adapters drew from torch's generator"
    first = next(name for name in one.state_dict() if name.endswith("lora_A.weight"))
    assert not torch.equal(one.state_dict()[first], other.state_dict()[first])
    assert all(not p.any() for name, p in one.named_parameters() if "lora_B" in name)
    assert_close(losses_of(one), losses_of(tiny_tuner(pipeline)), rtol=0, atol=0)


def test_every_a_is_drawn_as_torch_draws_a_layer(sd15: UNet2DConditionModel) -> None:
    """Uniform within 1 / sqrt(n) for n inputs, as nn.Linear and nn.Conv2d start."""
    unet = UNet2DConditionModel(
        block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    for name, a in adapters_of(unet, rank=32, convolutions=True).named_parameters():
        if name.endswith("lora_A.weight"):
            num_inputs = a[0].numel()
            assert a.abs().max() <= num_inputs**-0.5
            # 4 standard errors: the square of a uniform x has the variance 4 / 45 bound^4.
            error = 4 * (4 / 45 / a.numel()) ** 0.5 / num_inputs
            assert abs(a.square().mean().item() - 1 / (3 * num_inputs)) < error


@pytest.mark.parametrize("options", [{}, {"lora.convolutions": True, "lora.dora": True}])
def test_adapters_alone_have_gradients(options: dict[str, Any], pipeline: Path) -> None:
    tuner = tiny_tuner(pipeline, **LORA, **options)
    losses_of(tuner).sum().backward()
    trained = {id(p) for p in tuner.parameters()}
    assert trained == {id(p) for p in tuner.model.unet.parameters() if p.requires_grad}
    assert trained == {id(p) for p in tuner.model.unet.parameters() if p.grad is not None}
    groups = tuner.configure_optimizers()["optimizer"].param_groups  # type: ignore[index,call-overload]
    assert {id(p) for p in groups[0]["params"]} == trained


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_frozen_weights_in_the_format_of_computation_change_no_bit(
    precision: str, pipeline: Path
) -> None:
    held = tiny_tuner(pipeline, **EVERYTHING, **{"trainer.precision": precision})
    plain = tiny_tuner(pipeline, **EVERYTHING)
    low = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    layer = held.model.unet.get_submodule("down_blocks.0.resnets.0.conv1")
    assert layer.weight.dtype == low  # of the layer under the adapter
    assert {p.dtype for p in held.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
        one, two = losses_of(held), losses_of(plain)
        one.sum().backward()
        two.sum().backward()
    assert_close(one, two, rtol=0, atol=0)
    for ours, theirs in zip(held.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_a_sample_drops_out_the_same_alone_and_in_a_batch(pipeline: Path) -> None:
    tuner = tiny_tuner(pipeline, **EVERYTHING)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1)
        together = losses_of(tuner)
        alone = torch.cat([losses_of(tuner, slice(row, row + 1)) for row in range(2)])
        assert_close(together, alone, rtol=1e-4, atol=1e-4)
        tuner.model.unet.eval()
        assert (losses_of(tuner) - together).abs().max() > 1e-3


def test_gradient_checkpointing_has_the_same_gradients(pipeline: Path) -> None:
    tuners = [
        tiny_tuner(pipeline, **EVERYTHING, **{"trainer.gradient_checkpointing": on})
        for on in (False, True)
    ]
    for tuner in tuners:
        losses_of(tuner).sum().backward()
    one, two = ([p.grad for p in tuner.parameters()] for tuner in tuners)
    assert_close(one, two, rtol=0, atol=0)


@pytest.fixture(scope="module")
def unbroken(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with all kinds of adapters, validation and previews."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        without_exports(patch)
        assert blackpoint.train.run.fit(run_config(run_dir, pipeline, shards)) == 0
    return run_dir


def run_config(run_dir: Path, pipeline: Path, shards: Path, **overrides: Any) -> Any:
    looks = {"preview.every_steps": 3, "preview.num_steps": 2, "preview.num_images": 1}
    values = {**EVERYTHING, **looks, "data.validation_shards": str(shards), **overrides}
    return tiny_config(run_dir, pipeline, shards, **values)


def test_a_checkpoint_holds_adapters_alone_and_says_whose(unbroken: Path, pipeline: Path) -> None:
    saved = load_checkpoint(unbroken, 6)
    tuner = tiny_tuner(pipeline, **EVERYTHING)
    names = {f"unet.{name}" for name in tuner.unet.state_dict()}
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == names
    moments = saved["optimizer_states"][0]["state"]
    shapes = [value.shape for value in tuner.state_dict().values()]
    assert [moments[row]["exp_avg"].shape for row in range(len(moments))] == shapes
    record = saved["blackpoint"]
    assert record["base"] == str(pipeline.resolve())
    assert record["lora"] == {
        "rank": 2,
        "alpha": 1.0,
        "dora": False,
        "targets": list(LoraConfig(rank=2, convolutions=True).all_targets),
    }
    identity = blackpoint.train.run.RunRecord.read(unbroken).identity
    assert record["base_digest"] == unet_digest_in(identity) != ""


def test_training_moves_every_adapter_and_lowers_the_loss(unbroken: Path, pipeline: Path) -> None:
    start = tiny_tuner(pipeline, **EVERYTHING).state_dict()
    saved = load_checkpoint(unbroken, 6)
    for state in ("state_dict", "current_model_state"):
        moved = [name for name, value in saved[state].items() if torch.equal(value, start[name])]
        assert moved == []
    assert (unbroken / "previews" / "step_00000006.png").is_file()


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_run_of_adapters_equals_an_unbroken_one(
    unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path, step: int
) -> None:
    config = run_config(tmp_path / "run", pipeline, shards)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, step, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_without_its_record_a_run_still_knows_its_base(
    unbroken: Path, pipeline: Path, tmp_path: Path
) -> None:
    """identity.json may be lost; the checkpoint names the base by its content too."""
    path = unbroken / "checkpoints" / "step_00000006.ckpt"
    digest = load_checkpoint(unbroken, 6)["blackpoint"]["base_digest"]
    check_base(path, "moved", digest)
    with pytest.raises(UserError, match=r"adapters of another base: .* checkpoint=other has 0000"):
        check_base(path, "other", "0" * 32)


def test_a_run_is_refused_another_base_and_another_rank(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    base = make_tiny_pipeline(tmp_path / "base")
    config = run_config(tmp_path / "run", base, shards)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    for key, value in (("lora.rank", 4), ("lora.alpha", 2.0), ("lora.convolutions", False)):
        with pytest.raises(UserError, match=rf"another config:\n  {key}: .* there, {value} now"):
            blackpoint.train.run.fit(run_config(tmp_path / "run", base, shards, **{key: value}))
    make_tiny_pipeline(base, seed=1)
    (tmp_path / "run" / "identity.json").unlink()
    with pytest.raises(UserError, match="adapters of another base"):
        blackpoint.train.run.fit(config)


def test_a_checkpoint_is_little_more_than_four_times_its_adapters(
    sd15: UNet2DConditionModel,
) -> None:
    """Weights, average and two moments, at the widths of SD 1.5 and the default layers."""
    adapters = adapters_of(sd15, rank=16).to_empty(device="cpu")
    for parameter in adapters.parameters():
        parameter.data.zero_()
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(
        adapters.parameters(), tiny_config(Path("run"), Path("sd"), Path("shards")).optimizer
    )
    optimizer.step()
    average = Average(adapters, torch.device("cpu"), 0.9)
    file = io.BytesIO()
    states = {"state_dict": average.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"current_model_state": adapters.state_dict(), **states}, file)
    num_bytes = sum(p.nbytes for p in adapters.parameters())
    assert num_bytes == 4 * 6_782_976
    assert 4 * num_bytes < file.tell() < 4.2 * num_bytes


def test_the_learning_rate_that_is_not_set_is_that_of_what_is_trained(pipeline: Path) -> None:
    free: dict[str, Any] = {"optimizer.learning_rate": None}
    assert tiny_tuner(pipeline, **free).config.optimizer.learning_rate == 1e-5
    assert tiny_tuner(pipeline, **LORA, **free).config.optimizer.learning_rate == 1e-4
    assert tiny_tuner(pipeline, **LORA).config.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora.rank": 0}, r"lora\.rank=0 is out of range; it must be >= 1"),
        ({"lora.rank": 2, "lora.alpha": 0.0}, r"lora\.alpha=0\.0 is out of range"),
        ({"lora.rank": 2, "lora.alpha": float("nan")}, r"lora\.alpha=nan is out of range"),
        ({"lora.rank": 2, "lora.dropout": 1.0}, r"lora\.dropout=1\.0 is out of range"),
        ({"lora.rank": 2, "lora.targets": []}, r"lora\.targets=\[\] names no layers"),
        ({"lora.alpha": 2.0}, r"lora\.alpha=2\.0, but lora\.rank is not set"),
        ({"lora.dora": True}, r"lora\.dora=True, but lora\.rank is not set"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(Path("run"), Path("sd"), Path("shards"), **values)


def test_a_model_made_for_the_run_has_no_adapters() -> None:
    with pytest.raises(UserError, match=r"lora\.rank=2, but checkpoint is not set"):
        tiny_config(Path("run"), None, Path("shards"), **LORA)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lora.rank": 17},
            r"lora\.rank=17: must be at most the width of every layer, and \S+ has",
        ),
        ({"lora.targets": ["to_q", "to_x"]}, r"lora\.targets holds 'to_x', which is nothing in"),
        ({"lora.targets": ["attn1"]}, r"lora\.targets holds 'attn1', which is Attention in"),
        ({"lora.targets": [""]}, r"lora\.targets holds '', which is nothing in"),
    ],
)
def test_a_base_that_cannot_take_the_adapters_leaves_nothing(
    values: dict[str, Any], message: str, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **(LORA | values))
    with pytest.raises(UserError, match=message):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()
