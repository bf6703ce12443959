"""Exports of SDXL: stock diffusers samples the folder as we do, or nothing is written."""

import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.checkpoints.fingerprint import sampling_digest
from blackpoint.sampling.checkpoints.saving import STABLE_DIFFUSION_XL
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.run import fit
from tests.test_sdxl_model import ZERO_SNR
from tests.tiny_run import tiny_config
from tests.tiny_sdxl import make_tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "sdxl"
    return make_tiny_sdxl(place, scheduler=DDIMScheduler.from_config(ZERO_SNR.to_diffusers()))


def test_a_folder_is_compared_with_the_stock_pipeline_and_is_the_same_model(
    folder: Path, tmp_path: Path
) -> None:
    """With every sampler of ours that has a counterpart, guided by the empty prompt."""
    output = export(folder, tmp_path / "out")
    models = [DiffusionModel.load(place) for place in (folder, output)]
    assert len({sampling_digest(model) for model in models}) == 1
    config = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"
    card = (output / "README.md").read_text()
    assert "# Stable Diffusion XL, exported" in card
    assert 'StableDiffusionXLPipeline.from_pretrained("path/to/this/folder")' in card
    assert "`force_zeros_for_empty_prompt` is\nfalse" in card and "safety_checker" not in card


@pytest.mark.slow
def test_the_published_process_passes_too(tmp_path: Path) -> None:
    """Epsilon, non-zero terminal SNR, Euler's linspace."""
    export(make_tiny_sdxl(tmp_path / "sdxl"), tmp_path / "out")


def test_an_empty_prompt_that_is_zeros_there_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STABLE_DIFFUSION_XL, "force_zeros_for_empty_prompt", True)
    with pytest.raises(RunFailed, match="DDIM.* latents differ by"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_of_adapters_leaves_files_for_each_client(shards: Path, tmp_path: Path) -> None:
    """Its exports compare what they wrote with peft and diffusers; kohya's names are LDM's."""
    base = make_tiny_sdxl(tmp_path / "sdxl")
    values = {"lora.rank": 2, "trainer.max_steps": 1, "trainer.validate_every_steps": 0}
    run_dir = tmp_path / "run"
    assert fit(tiny_config(run_dir, base, shards, **values)) == 0
    assert DiffusionModel.load(run_dir / "export").is_xl
    file = run_dir / "export_lora" / "export_lora.safetensors"
    with safe_open(file, framework="pt") as header:
        assert header.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    card = (run_dir / "export_lora" / "README.md").read_text()
    assert f'StableDiffusionXLPipeline.from_pretrained("{base}")' in card
    names = load_file(file)
    assert all(name.startswith("lora_unet_") for name in names)
    assert any(name.startswith("lora_unet_input_blocks_3_1_transformer_blocks_0") for name in names)
