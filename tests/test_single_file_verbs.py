"""Every verb that takes a checkpoint takes a single file, and what was begun with a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import sampling_digest, text_encoder_digest
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.evaluation.rows import SETTINGS as EVALUATION
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.scripts.sweep.content_digest import digest_of_weights
from blackpoint.train import run
from tests.pixel_models import pixel_train_config
from tests.tiny_run import make_tiny_shards, tiny_config
from tests.tiny_single_file import make_folder, tensors_of, write_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd") / "sd1", "sd1")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_file(folder.parent / "sd1.safetensors", tensors_of(folder))


@pytest.fixture(scope="module")
def without_vae(folder: Path) -> Path:
    tensors = tensors_of(folder)
    rest = {name: one for name, one in tensors.items() if not name.startswith("first_stage_model")}
    return write_file(folder.parent / "without.safetensors", rest)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_shards(tmp_path_factory.mktemp("images"))


def test_images_begun_with_a_folder_go_on_with_the_file(
    folder: Path, file: Path, without_vae: Path, tmp_path: Path
) -> None:
    keys = ["sample", "prompts=a cat", f"output={tmp_path / 'out'}", "num_steps=1", "num_images=2"]
    assert main([*keys, f"checkpoint={folder}"]) == 0
    _forget_single_file(tmp_path / "out" / "sample.json")
    last = sorted((tmp_path / "out" / "images").iterdir())[-1]
    content = last.read_bytes()
    for more in (
        [f"checkpoint={file}"],
        [f"checkpoint={without_vae}", f"single_file.vae={folder}"],
    ):
        last.unlink()
        assert main([*keys, *more]) == 0
        assert last.read_bytes() == content


def test_search_and_evaluate_take_a_file_and_go_on_with_what_an_earlier_version_began(
    file: Path, tmp_path: Path
) -> None:
    keys = [f"checkpoint={file}", "prompts=a cat", "num_steps=1"]
    found = ["budget_nfe=4", "verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
    for verb, more, record in (("search", found, "search.json"), ("evaluate", [], EVALUATION)):
        command = [verb, *keys, *more, f"output={tmp_path / verb}"]
        assert main(command) == 0
        _forget_single_file(tmp_path / verb / record)
        assert main(command) == 0
        assert main([*command, "single_file.prediction_type=v_prediction"]) == 2
    assert (tmp_path / "search" / "winners.jsonl").stat().st_size


def _forget_single_file(path: Path) -> None:
    """Makes a record one of a version before single files."""
    content = json.loads(path.read_text())
    del content["single_file"]
    path.write_text(json.dumps(content))


def test_a_run_from_a_file_goes_on_from_the_folder(
    folder: Path, file: Path, shards: Path, tmp_path: Path
) -> None:
    keys = {"trainer.max_steps": 2, "trainer.checkpoint_every_steps": 2}
    config = tiny_config(tmp_path / "run", file, shards, **keys)
    assert run.fit(config) == 0
    config = tiny_config(tmp_path / "run", folder, shards, **(keys | {"trainer.max_steps": 4}))
    assert run.fit(config) == 0
    whole = tiny_config(tmp_path / "whole", folder, shards, **(keys | {"trainer.max_steps": 4}))
    assert run.fit(whole) == 0
    runs = [DiffusionModel.load(tmp_path / name) for name in ("run", "whole")]
    for one, other in zip(*(model.unet.parameters() for model in runs), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    last = tmp_path / "run" / "checkpoints" / "step_00000002.ckpt"
    if last.exists():
        assert DiffusionModel.load(last).image_size == 16


def test_a_ckpt_knows_what_its_file_lacked(
    folder: Path, without_vae: Path, shards: Path, tmp_path: Path
) -> None:
    keys = {"trainer.max_steps": 1, "single_file.vae": str(folder)}
    assert run.fit(tiny_config(tmp_path / "run", without_vae, shards, **keys)) == 0
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    model = DiffusionModel.load(checkpoint)
    model.load_encoders()
    assert sampling_digest(model) == sampling_digest(DiffusionModel.load(tmp_path / "run"))
    with pytest.raises(UserError, match=r"prediction_type=epsilon: .*ckpt is no single file, and"):
        DiffusionModel.load(checkpoint, single_file=SingleFileConfig(prediction_type="epsilon"))
    with pytest.raises(UserError, match="zero_terminal_snr=True: .*ckpt is no single file, and"):
        DiffusionModel.load(checkpoint, single_file=SingleFileConfig(zero_terminal_snr=True))
    record = torch.load(checkpoint, weights_only=True)["blackpoint"]
    assert SingleFileConfig(**record["single_file"]) == SingleFileConfig(vae=str(folder))


def test_latents_of_a_file_train_a_folder_and_keep_no_trace_of_the_process(
    folder: Path, file: Path, shards: Path, tmp_path: Path
) -> None:
    latents = tmp_path / "latents"
    keys = [f"source={shards}", f"output={latents}", "num_workers=0", "num_processes=1"]
    assert main(["data", "encode", f"checkpoint={file}", *keys]) == 0
    config = tiny_config(tmp_path / "run", folder, latents, **{"trainer.max_steps": 1})
    assert run.fit(config) == 0


def test_a_pixel_space_run_takes_its_text_encoder_from_a_file(
    folder: Path, without_vae: Path, shards: Path, tmp_path: Path
) -> None:
    keys = {"trainer.max_steps": 1, "single_file.vae": str(folder)}
    config = pixel_train_config(tmp_path / "run", shards, "text", without_vae, **keys)
    assert run.fit(config) == 0
    digests = [
        text_encoder_digest(resolve(one).pipeline) for one in (tmp_path / "run" / "base", folder)
    ]
    assert digests[0] == digests[1]


def test_export_converts_a_file(folder: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", f"checkpoint={file}", f"output={out}", "verify=false"]) == 0
    digests = [sampling_digest(DiffusionModel.load(one)) for one in (out, folder)]
    assert digests[0] == digests[1]
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_a_sweep_sees_another_yaml_beside_a_file(file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(file, tmp_path / "one.safetensors"))
    digests = [digest_of_weights(path, "ema")]
    for word in ("v", "eps"):
        path.with_suffix(".yaml").write_text(f"model: {{params: {{parameterization: {word}}}}}")
        digest_of_weights.cache_clear()
        digests.append(digest_of_weights(path, "ema"))
    assert len({*digests}) == 3
    moved = Path(shutil.move(path, tmp_path / "two.safetensors"))
    path.with_suffix(".yaml").rename(moved.with_suffix(".yaml"))
    assert digest_of_weights(moved, "ema") == digests[-1]
