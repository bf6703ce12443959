"""SDXL folders are loaded, known, sampled and saved as StableDiffusionXLPipeline does."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import sampling_digest, text_encoder_digest
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import run
from blackpoint.sampling.schedule import NoiseSchedule
from tests.tiny_sdxl import make_tiny_sdxl
from tests.toy_denoisers import step_noise

PROMPTS = ["a red one on a black background", "a blue two"]
ZERO_SNR = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
GUIDED: dict[str, Any] = {"num_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.7}
UNET, VAE = "unet/config.json", "vae/config.json"
SECOND = "text_encoder_2/config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "sdxl"
    return make_tiny_sdxl(place, scheduler=DDIMScheduler.from_config(ZERO_SNR.to_diffusers()))


@pytest.fixture(scope="module")
def stock_images(folder: Path) -> Tensor:
    return stock(folder)


def stock(folder: Path, **changes: Any) -> Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "negative_prompt": [""] * 2,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "generator": [torch.Generator().manual_seed(seed) for seed in (3, 4)],
        "output_type": "pt",
    }
    images: Tensor = pipeline(PROMPTS, **(settings | changes)).images
    return images


def edited(folder: Path, copy: Path, file: str, entries: dict[str, Any]) -> Path:
    """Copies a folder with entries of a JSON file changed."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return copy


def test_a_loaded_folder_is_sampled_as_by_the_stock_pipeline(
    folder: Path, stock_images: Tensor
) -> None:
    """With latents as the UNet is made for, guided and rescaled."""
    model = DiffusionModel.load(folder)
    assert model.is_xl and model.process.prediction_type == "v_prediction"
    assert_close(model.sample(PROMPTS, [3, 4], **GUIDED), stock_images, rtol=0, atol=1e-4)


def test_a_saved_folder_is_the_same_model_to_both(
    folder: Path, stock_images: Tensor, tmp_path: Path
) -> None:
    model, saved = DiffusionModel.load(folder), tmp_path / "saved"
    model.save(saved)
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is False
    again = DiffusionModel.load(saved)
    assert sampling_digest(again) == sampling_digest(model)
    assert [t.pad_token_id for t in again.tokenizers] == [model.tokenizer.eos_token_id, 0]
    assert_close(stock(saved, negative_prompt=None), stock_images, rtol=0, atol=1e-6)
    for part in ("text_encoder", "text_encoder_2"):
        name = f"{part}/model.safetensors"
        assert load_file(saved / name).keys() == published_names(load_file(folder / name))


def published_names(weights: dict[str, Tensor]) -> set[str]:
    """Names as in the files of stabilityai/stable-diffusion-xl-base-1.0, by transformers 4."""
    bare = {name.removeprefix("text_model.") for name in weights}
    return {name if name == "text_projection.weight" else f"text_model.{name}" for name in bare}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variants_of_a_folder_are_read(folder: Path, tmp_path: Path, variant: str | None) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    model = DiffusionModel.load(tmp_path / "half", variant=variant)
    model.load_encoders()
    assert torch.equal(model.unet.conv_in.weight, pipeline.unet.conv_in.weight.float())
    ours, theirs = model.text_encoder_2.text_projection, pipeline.text_encoder_2.text_projection
    assert torch.equal(ours.weight, theirs.weight.float())


def test_the_hub_is_asked_for_both_encoders_and_tokenizers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the names of stabilityai/stable-diffusion-xl-base-1.0, one file a part."""
    stems = {part: "diffusion_pytorch_model" for part in ("unet", "vae", "vae_1_0")}
    stems |= {"text_encoder": "model", "text_encoder_2": "model"}
    names = [f"{p}/{stem}{v}.safetensors" for p, stem in stems.items() for v in ("", ".fp16")]
    names += ["sd_xl_base_1.0.safetensors", "text_encoder_2/model.onnx", "tokenizer_2/merges.txt"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, hub_id: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("some/one", variant="fp16")
    assert {name for name in asked if name.endswith(".safetensors")} == {
        f"{part}/{stems[part]}.fp16.safetensors"
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    assert {"tokenizer/*", "tokenizer_2/*", "text_encoder_2/config.json"} <= set(asked)


def test_the_digest_takes_in_the_second_encoder_and_its_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    digests = {text_encoder_digest(PipelineFolder(folder))}
    weights = edited(folder, tmp_path / "weights", SECOND, {})
    file = weights / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    padding = tmp_path / "padding"
    shutil.copytree(folder, padding)
    shutil.copytree(padding / "tokenizer", padding / "tokenizer_2", dirs_exist_ok=True)
    setting = edited(folder, tmp_path / "setting", SECOND, {"hidden_act": "quick_gelu"})
    digests |= {text_encoder_digest(PipelineFolder(one)) for one in (weights, padding, setting)}
    assert len(digests) == 4


def test_leading_timesteps_begin_where_the_stock_pipeline_begins(
    folder: Path, tmp_path: Path
) -> None:
    """It takes steps_offset as it is written; StableDiffusionPipeline makes 1 of 0."""
    entries = {"timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False}
    copy = edited(folder, tmp_path / "sdxl", "scheduler/scheduler_config.json", entries)
    model = DiffusionModel.load(copy)
    assert model.process.timesteps(4) == [750, 500, 250, 0]
    assert_close(model.sample(PROMPTS, [3, 4], **GUIDED), stock(copy), rtol=0, atol=1e-4)
    model.save(tmp_path / "saved")
    assert DiffusionModel.load(tmp_path / "saved").process.timesteps(4) == [750, 500, 250, 0]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_turbo_is_sampled_as_by_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """Epsilon, trailing, ancestral Euler, no guidance, with the noise of our steps on both sides.

    Their Euler starts from sigma times unit noise in our coordinates, at SNR 0.0047; latents of
    epsilon are divided by alpha[999] = 0.068, so that roundings of 1e-6 come out as 1e-4 of them.
    """
    published = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }
    scheduler = EulerAncestralDiscreteScheduler(**published)
    copy = make_tiny_sdxl(tmp_path / "turbo", scheduler=scheduler)
    model = DiffusionModel.load(copy)
    assert model.process.prediction_type == "epsilon"
    assert model.process.timesteps(4) == [999, 749, 499, 249]
    shape, seeds = model.latent_shape(), [3, 4]
    steps = iter(range(num_steps))

    def theirs_noise(*_: Any, **__: Any) -> Tensor:
        return step_noise(seeds, next(steps), shape=shape)

    noise = initial_noise(seeds, shape)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", theirs_noise)
    theirs = stock(
        copy,
        latents=noise,
        guidance_scale=0.0,
        num_inference_steps=num_steps,
        guidance_rescale=0.0,
        negative_prompt=None,
        output_type="latent",
    )
    grid = model.process.grid(num_steps, "euler_ancestral")
    with torch.no_grad():
        denoise = model.denoiser(model.encode_prompts(PROMPTS))

        def drawn(step: int) -> Tensor:
            return step_noise(seeds, step, shape=shape)

        start = SampleState(noise * grid.sigma[0])
        ours = run("euler_ancestral", denoise, grid, start, noise=drawn).x
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "refiner": (
        "model_index.json",
        {"text_encoder": [None, None], "tokenizer": [None, None]},
        "is the refiner of Stable Diffusion XL .it has no text_encoder.*xl-base-1.0",
    ),
    "refiner with both encoders": (
        UNET,
        {"projection_class_embeddings_input_dim": 5 * 8 + 24},
        "is the refiner of Stable Diffusion XL; only plain",
    ),
    "inpainting": (UNET, {"in_channels": 9}, "is an inpainting model .in_channels=9"),
    "LCM": (UNET, {"time_cond_proj_dim": 256}, "a latent consistency model"),
    "no sizes": (UNET, {"addition_embed_type": None}, "without SDXL's sizes"),
    "another condition": (UNET, {"addition_embed_type": "image"}, "a Kandinsky 2.2"),
    "another projection": (
        SECOND,
        {"projection_dim": 40},
        "projection_class_embeddings_input_dim=72 in unet/config.json, and 6 sizes of 8 .*"
        "projection of 40 .*make 88; they are of different models",
    ),
    "projection as text": (SECOND, {"projection_dim": "24"}, "projection_dim='24'"),
    "another second encoder": (
        SECOND,
        {"hidden_size": 64},
        r"of width 80 .*its text encoders make 32 \+ 64 .*text_encoder/, text_encoder_2/config",
    ),
    "T5": (SECOND, {"model_type": "t5"}, "text_encoder_2 is of model_type t5, not CLIP"),
    "other lengths": (SECOND, {"max_position_embeddings": 77}, "texts of 16 and 77 tokens"),
    "sizes as text": (UNET, {"addition_time_embed_dim": "8"}, "addition_time_embed_dim='8'"),
    "Playground": (VAE, {"latents_mean": [0.0] * 4}, "latents_mean=.*Playground 2.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_sdxl_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    file, entries, message = REFUSED[name]
    copy = edited(folder, tmp_path / "sdxl", file, entries)
    with pytest.raises(UserError, match=f"(?s){message}"):
        DiffusionModel.load(copy, with_unet=False)


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    for part in ("tokenizer_2", "text_encoder_2"):
        copy = tmp_path / part
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / part)
        with pytest.raises(UserError, match=f"{part}.* missing"):
            DiffusionModel.load(copy)


def test_a_projection_of_another_shape_than_its_config_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    copy = edited(folder, tmp_path / "sdxl", SECOND, {})
    file = copy / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    weights["text_projection.weight"] = weights["text_projection.weight"].T.contiguous()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"such as text_projection.weight: \[48, 24\] in the file"):
        DiffusionModel.load(copy).load_encoders()


@pytest.mark.parametrize("sides", [{"height": 20}, {"width": 12}])
def test_sides_that_the_unet_cannot_halve_to_the_end_are_refused(
    folder: Path, sides: dict[str, int]
) -> None:
    """Three levels: 4 times the 2 px of a latent here, 32 px in SDXL."""
    [(name, side)] = sides.items()
    with pytest.raises(UserError, match=f"{name}={side} must be a positive multiple of 8 px"):
        DiffusionModel.load(folder).sample("a one", [0], **sides)
