"""Number formats of trainings: what encoders compute in, what is recorded, and who may resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
import blackpoint.train.start
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import text_encoder_digest
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.scripts.cli import main
from blackpoint.train.cluster.device import check_count, settled, training_device
from blackpoint.train.draws import draw
from blackpoint.train.module import FineTuner
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.run_directory import RunRecord, write_records
from blackpoint.train.start import starting_model
from tests.devices import auto_takes_bfloat16, fake_gpus
from tests.pixel_models import pixel_train_config
from tests.tiny_pipeline import make_overflowing_pipeline
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    stop_in_step,
    tiny_config,
)

LENGTH = {"trainer.max_steps": 2, "trainer.validate_every_steps": 0}


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


def tuner_of(pipeline: Path, shards: Path, dtype: str) -> FineTuner:
    config = tiny_config(Path("run"), pipeline, shards, **{"trainer.encoder_dtype": dtype})
    return FineTuner(starting_model(config, torch.device("cpu")), config)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": image, "caption": ["a white background", "", "a gray night"]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_encoders_of_low_precision_give_float32_near_that_of_float32(
    pipeline: Path, shards: Path, dtype: str
) -> None:
    """Their weights alone are rounded: 2^-8 relative in bfloat16; noise and x0 stay float32."""
    plain, low = (tuner_of(pipeline, shards, each) for each in ("float32", dtype))
    for part in (low.model.vae, low.model.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {getattr(torch, dtype)}
    assert {weight.dtype for weight in low.unet.parameters()} == {torch.float32}
    draws = draw(0, [0, 0, 0], [0, 1, 2], low.latent_shape(batch()), 1000)
    expected = plain.encode(batch(), draws.posterior_noise)
    found = low.encode(batch(), draws.posterior_noise)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert (found - expected).norm() < 2e-2 * expected.norm()
    embeds, expected = (each.condition(batch()).prompt_embeds for each in (low, plain))
    assert embeds.dtype == torch.float32 and not torch.equal(embeds, expected)
    assert (embeds - expected).norm() < 2e-2 * expected.norm()
    output, target = low.predict(batch(), draws)
    assert output.dtype == target.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_previews_embed_texts_as_training_does(pipeline: Path, shards: Path, dtype: str) -> None:
    """Previews sample under the run's autocast, which must not reach the text encoder."""
    tuner = tuner_of(pipeline, shards, dtype)
    captions = ["a white background"]
    trained = tuner.embed(captions).prompt_embeds
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        previewed = tuner.model.encode_prompts(captions).prompt_embeds
    assert previewed.dtype == torch.float32
    assert_close(previewed, trained, rtol=0, atol=0)


def test_a_base_made_for_the_run_keeps_its_text_encoder_in_float32(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = pixel_train_config(
        tmp_path / "run",
        shards,
        "text",
        pipeline,
        **LENGTH,
        **{"trainer.encoder_dtype": "bfloat16"},
    )
    held: list[torch.dtype] = []
    original = FineTuner.training_step

    def training_step(self: FineTuner, *arguments: Any) -> Any:
        held.append(self.model.text_encoder.dtype)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "training_step", training_step)
        assert blackpoint.train.run.fit(config) == 0
    assert held == [torch.bfloat16] * 2
    base, plain = PipelineFolder(tmp_path / "run" / "base"), PipelineFolder(pipeline)
    assert text_encoder_digest(base) == text_encoder_digest(plain)  # of values in float32


@pytest.mark.slow
def test_a_run_records_what_auto_took_and_goes_on_in_nothing_else(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Begun where auto is bfloat16, stopped, and started again where it is float32."""
    run_dir = tmp_path / "run"
    config = tiny_config(run_dir, pipeline, shards)
    explicit = {"trainer.encoder_dtype": "bfloat16"}
    assert (
        blackpoint.train.run.fit(tiny_config(tmp_path / "whole", pipeline, shards, **explicit)) == 0
    )
    with monkeypatch.context() as patch:
        auto_takes_bfloat16(patch)
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert "note: trainer.encoder_dtype=auto took bfloat16" in capsys.readouterr().err
    saved = OmegaConf.load(run_dir / "config.yaml")
    assert saved.trainer.encoder_dtype == "bfloat16" and saved.trainer.tf32 is False
    [start] = json.loads((run_dir / "environment.json").read_text())["starts"]
    assert (start["device"], start["encoder_dtype"], start["tf32"]) == ("cpu", "bfloat16", False)
    before = (run_dir / "metrics.csv").read_bytes()

    yaml = tmp_path / "again.yaml"
    OmegaConf.save(OmegaConf.structured(config), yaml)
    assert main(["train", str(yaml)]) == 2
    told = capsys.readouterr().err
    assert "trainer.encoder_dtype was bfloat16 there, and auto takes float32 on this cpu" in told
    assert "set trainer.encoder_dtype=bfloat16 to continue it here" in told
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert main(["train", str(yaml), "trainer.encoder_dtype=float32"]) == 2
    assert "trainer.encoder_dtype: bfloat16 there, float32 now" in capsys.readouterr().err
    assert main(["train", str(yaml), "trainer.encoder_dtype=bfloat16"]) == 0
    assert_same_run(run_dir, tmp_path / "whole")
    assert main(["train", str(yaml)]) == 0  # finished: nothing is computed
    check_continues(run_dir, config)  # a login node does not know what auto will take


@pytest.mark.parametrize("has_tf32", [True, False])
def test_a_run_without_a_record_goes_on_in_float32(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    has_tf32: bool,
) -> None:
    """Its config.yaml has tf32=false, or nothing, and no encoder_dtype."""
    config = tiny_config(tmp_path / "run", pipeline, shards)
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "whole", pipeline, shards)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_in_step(patch, 4, kill)
        blackpoint.train.run.fit(config)
    path = tmp_path / "run" / "config.yaml"
    old = OmegaConf.load(path)
    del old.trainer["encoder_dtype"]
    if not has_tf32:
        del old.trainer["tf32"]
    OmegaConf.save(old, path)
    capsys.readouterr()
    auto_takes_bfloat16(monkeypatch)
    assert blackpoint.train.run.fit(config) == 0
    told = capsys.readouterr().err
    assert "without a record of number formats; it goes on with trainer.encoder_dtype=float" in told
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_old_run_is_not_forced_into_other_formats(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, Path("base"), Path("shards"), **{"trainer.tf32": True})
    old = OmegaConf.structured(tiny_config(tmp_path, Path("base"), Path("shards")))
    plain = OmegaConf.to_container(old)
    assert isinstance(plain, dict)
    del plain["trainer"]["encoder_dtype"]
    plain["trainer"]["tf32"] = False
    OmegaConf.save(plain, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="trainer.tf32: False there, True now"):
        check_continues(tmp_path, config)


def test_what_gpus_take_is_settled_for_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpus(monkeypatch)
    config = tiny_config(tmp_path / "run", Path("base"), Path("shards"))
    found = settled(config, RunRecord.read(tmp_path / "run"), torch.device("cuda"))
    assert found.trainer.encoder_dtype == "bfloat16" and found.trainer.tf32 is True
    assert config.trainer.tf32 == "auto" and capsys.readouterr().err.count("note: ") == 1
    write_records(RunRecord.read(tmp_path / "run"), found, device="cuda")
    again = settled(config, RunRecord.read(tmp_path / "run"), torch.device("cuda"))
    assert again == found
    with pytest.raises(UserError, match="device that computes with trainer.encoder_dtype=bfloat16"):
        settled(config, RunRecord.read(tmp_path / "run"), torch.device("cpu"))


LAUNCHED = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        (LAUNCHED | {"LOCAL_RANK": "3"}, 3),  # by Lightning
        ({"SLURM_LOCALID": "2"}, 2),
        (
            LAUNCHED | {"LOCAL_RANK": "1", "SLURM_LOCALID": "0"},
            1,
        ),  # started by the first task of a job
    ],
)
def test_each_process_probes_its_own_gpu(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    number: int,
) -> None:
    """A probe takes some 0.4 GB of the GPU that it runs on."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    current = fake_gpus(monkeypatch, count=4)
    probed: list[torch.device] = []

    def probe(device: torch.device) -> None:
        probed.append(device)

    def prepare_unet(unet: Any, *_: Any, device: torch.device, **__: Any) -> None:
        probed.append(device)
        raise Killed

    monkeypatch.setattr("blackpoint.train.cluster.device.eight_bit_problem", probe)
    monkeypatch.setattr(blackpoint.train.start, "prepare_unet", prepare_unet)
    options = {"trainer.devices": 4, "optimizer.name": "adamw_8bit"}
    with pytest.raises(Killed):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **options))
    own = torch.device("cuda", number)
    assert probed == [own, own] and set(current) == {own}
    assert training_device() == own


def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=2)
    config = tiny_config(Path("run"), Path("base"), Path("shards"), **{"trainer.devices": 2})
    check_count(config, torch.device("cuda", 1))
    with pytest.raises(UserError, match="number 2 on its machine .LOCAL_RANK.*sees 2 GPUs"):
        check_count(config, torch.device("cuda", 2))


def test_an_overflow_in_a_float16_run_is_encoded_as_in_float32(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The autoencoder is read again: its weights in float16 would be rounded by 5e-4."""
    folder = make_overflowing_pipeline(tmp_path / "pipeline")
    low, plain = (tuner_of(folder, shards, dtype) for dtype in ("float16", "float32"))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert_close(low.encode(batch(), noise), plain.encode(batch(), noise), rtol=0, atol=0)
    assert low.model.vae.dtype == torch.float32
    assert low.model.text_encoder.dtype == torch.float16
    assert caplog.text.count("overflows in float16") == 1
