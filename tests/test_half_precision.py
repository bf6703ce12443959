"""Laws of fp16 and bf16 checkpoints: what is cast, what never is, and an autoencoder's overflow."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.schedule import NoiseSchedule
from tests.tiny_pipeline import make_overflowing_pipeline, make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config

# A zero-terminal-SNR schedule that travels as trained_betas.
TRAINED_BETAS = NoiseSchedule.scaled_linear(0.001, 0.011).zero_terminal_snr().betas.tolist()
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "trained_betas": TRAINED_BETAS,
    "set_alpha_to_one": True,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
STORED = {
    "fp16 variant": (torch.float16, "fp16"),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    folders = {"fp32": make_tiny_pipeline(root / "fp32", scheduler=SCHEDULER)}
    for name, (dtype, variant) in STORED.items():
        folders[name] = make_tiny_pipeline(root / name, scheduler=SCHEDULER, variant=variant)
        if variant is None:
            for file in folders[name].glob("*/*.safetensors"):
                cast = {key: value.to(dtype) for key, value in load_file(file).items()}
                save_file(cast, file, metadata={"format": "pt"})
    return folders


def scheduler_config(folder: Path) -> dict:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def dtypes_in(folder: Path) -> set[torch.dtype]:
    files = [*folder.glob("unet/*.safetensors"), *folder.glob("vae/*.safetensors")]
    return {value.dtype for file in files for value in load_file(file).values()}


@pytest.mark.parametrize("name", STORED)
def test_stored_weights_load_exactly_and_the_schedule_stays_float64(
    pipelines: dict[str, Path], name: str
) -> None:
    dtype = STORED[name][0]
    assert dtypes_in(pipelines[name]) == {dtype}
    for asked in (torch.float32, dtype):
        model = DiffusionModel.load(pipelines[name], dtype=asked)
        for part in (model.unet, model.vae, model.text_encoder):
            assert {weight.dtype for weight in part.parameters()} == {asked}
        stored = load_file(next((pipelines[name] / "unet").glob("*.safetensors")))
        weights = dict(model.unet.state_dict())
        assert_close(weights, {k: v.to(asked) for k, v in stored.items()}, rtol=0, atol=0)
        assert model.process.schedule.alpha_bar.dtype == torch.float64
        expected = NoiseSchedule.from_betas(torch.tensor(TRAINED_BETAS, dtype=torch.float64))
        assert_close(model.process.schedule.alpha_bar, expected.alpha_bar, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_half_precision_base_trains_in_float32_and_exports_its_schedule(
    pipelines: dict[str, Path], shards: Path, tmp_path: Path, name: str
) -> None:
    length = {"trainer.max_steps": 1, "trainer.validate_every_steps": 0}
    config = tiny_config(tmp_path / "run", pipelines[name], shards, **length)
    assert blackpoint.train.run.fit(config) == 0
    saved = torch.load(tmp_path / "run/checkpoints/step_00000001.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert {value.dtype for value in saved[key].values()} == {torch.float32}
    assert {
        value.dtype
        for state in saved["optimizer_states"][0]["state"].values()
        for value in state.values()
    } == {torch.float32}
    written = scheduler_config(tmp_path / "run" / "export")
    assert written == scheduler_config(export(pipelines["fp32"], tmp_path / "fp32", verify=False))
    assert_close(written["trained_betas"], TRAINED_BETAS, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", *STORED])
def test_export_in_any_format_writes_the_same_schedule(
    pipelines: dict[str, Path], tmp_path: Path, name: str
) -> None:
    configs = []
    for dtype in ("float32", "float16", "bfloat16"):
        folder = export(pipelines[name], tmp_path / dtype, dtype=dtype, verify=name == "fp32")
        assert dtypes_in(folder) == {getattr(torch, dtype)}
        configs.append(scheduler_config(folder))
        again = DiffusionModel.load(folder, dtype=getattr(torch, dtype))
        assert again.process.schedule.alpha_bar[-1] == 0
    assert configs[0] == configs[1] == configs[2]
    assert_close(configs[0]["trained_betas"], TRAINED_BETAS, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_near_float32(
    pipelines: dict[str, Path], dtype: torch.dtype
) -> None:
    expected = DiffusionModel.load(pipelines["fp16"]).sample("a one", [0], num_steps=3)
    found = DiffusionModel.load(pipelines["fp16"], dtype=dtype).sample("a one", [0], num_steps=3)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.02


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_overflowing_pipeline(tmp_path_factory.mktemp("overflow"))


def encode_then_decode(model: DiffusionModel, images: Tensor, latents: Tensor) -> list[Tensor]:
    return [model.encode(images), model.decode(latents)]


@pytest.mark.parametrize("first", ["encode", "decode"])
def test_overflow_of_an_fp16_autoencoder_is_computed_again_from_its_float32_weights(
    overflowing: Path, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    """Weights that were rounded to fp16 would be off by 5e-4: they are read again."""
    images, latents = torch.rand(9, 3, 16, 16), torch.randn(9, 4, 8, 8)
    half = DiffusionModel.load(overflowing, dtype=torch.float16)
    raw = half.vae.decode(latents.half()).sample
    assert not torch.isfinite(raw).all()
    full = DiffusionModel.load(overflowing)
    order = ("encode", "decode") if first == "encode" else ("decode", "encode")
    given = {"encode": images, "decode": latents}
    with caplog.at_level(logging.WARNING):
        found = {name: getattr(half, name)(given[name]) for name in order}
    for name in order:
        assert_close(found[name], getattr(full, name)(given[name]), rtol=0, atol=0)
    said = [record.message for record in caplog.records if "overflows in float16" in record.message]
    assert len(said) == 1
    assert half.vae.dtype == torch.float32 and half.unet.dtype == torch.float16
    assert not half.vae.training and not any(p.requires_grad for p in half.vae.parameters())


def test_an_autoencoder_of_no_file_is_computed_again_in_float32(overflowing: Path) -> None:
    full = DiffusionModel.load(overflowing)
    parts = (full.vae, full.text_encoder, full.tokenizer, full.process)
    latents = torch.randn(2, 4, 8, 8)
    expected = full.decode(latents)
    held = DiffusionModel(full.unet, *parts)
    held.set_encoder_dtype(torch.float16)
    assert_close(held.decode(latents), expected, rtol=0, atol=2e-2)  # of rounded weights


def test_latents_that_are_not_finite_do_not_blame_the_autoencoder(
    pipelines: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = DiffusionModel.load(pipelines["fp16"], dtype=torch.float16)
    assert not torch.isfinite(model.decode(torch.full((1, 4, 8, 8), torch.nan))).all()
    assert model.vae.dtype == torch.float16 and not caplog.records


def test_autoencoder_of_a_training_run_ignores_mixed_precision(overflowing: Path) -> None:
    """Previews decode under the run's autocast, which in fp16 would overflow unseen."""
    model = DiffusionModel.load(overflowing)
    images, latents = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    expected = encode_then_decode(model, images, latents)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert not torch.isfinite(model.vae.decode(latents).sample).all()
        found = encode_then_decode(model, images, latents)
    assert_close(found, expected, rtol=0, atol=0)
