"""Any text-to-image pipeline of diffusers behind our samplers: the same images, the same rows.

The peers are the stock pipelines, one seed at a time, with Euler for flow matching and diffusers'
DDIM for the others.
"""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler
from torch.testing import assert_close

from blackpoint.sampling.checkpoints.fingerprint import loaded_digest
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pipelines.agreement import check_agreement
from blackpoint.sampling.pipelines.flow import is_flow
from blackpoint.sampling.pipelines.load import index_of, is_other_pipeline, load_pipeline
from blackpoint.sampling.pipelines.model import PipelineModel
from blackpoint.sampling.process import Process
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_pipelines import FAMILIES, SAVED, build, make
from tests.tiny_sdxl import make_tiny_sdxl

SIDE, STEPS, SCALE = 32, 5, 4.0
PROMPTS, SEEDS = ["a white cat", "a black night on snow"], [3, 5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def load(root: Path) -> Any:
    """Loads a family once: from a folder where that can hold it."""

    def loaded(name: str) -> PipelineModel:
        if name not in SAVED:
            model = PipelineModel(build(name, root), SIDE, SIDE)
            check_agreement(model, Guidance(SCALE), STEPS)
            return model
        path = make(name, root)
        sides = {"height": SIDE, "width": SIDE}
        cpu, guidance = torch.device("cpu"), Guidance(SCALE)
        return load_pipeline(
            path, index_of(path) or {}, cpu, torch.float32, guidance=guidance, **sides
        )

    return cache(loaded)


def sample(model: Any, prompts: list[str], seeds: list[int], **options: Any) -> torch.Tensor:
    about = {"num_steps": STEPS, "guidance_scale": SCALE, "guidance_rescale": 0.0}
    return model.sample(prompts, seeds, **(about | {"height": SIDE, "width": SIDE} | options))


def stock(
    pipeline: Any, prompt: str, seed: int, steps: int = STEPS, scale: float = SCALE, **options: Any
) -> torch.Tensor:
    """Returns the image of a pipeline as anybody calls it, with DDIM where it is of diffusion."""
    if not is_flow(dict(pipeline.scheduler.config) | named(pipeline.scheduler)):
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False
    return pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=scale,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
        **options,
    ).images


def named(scheduler: Any) -> dict[str, str]:
    return {"_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_the_stock_pipelines(family: str, root: Path, load: Any) -> None:
    """Two prompts against two calls of one; 1e-5 is 100 roundings of a pixel."""
    model = load(family)
    sampler = "dpmpp_2m" if family == "sana_dpm" else "ddim"
    if isinstance(model.process, Process):
        model.process = model.process.respaced("trailing")
    images = sample(model, PROMPTS, SEEDS, sampler=sampler)
    pipeline = build(family, root)
    for image, prompt, seed in zip(images, PROMPTS, SEEDS, strict=True):
        assert_close(image[None], stock(pipeline, prompt, seed), rtol=0, atol=1e-5)
    assert (images[0] - images[1]).abs().max() > 0.1


def test_sdxl_is_the_same_by_both_routes(tmp_path: Path) -> None:
    """SDXL always loads as DiffusionModel; through its pipeline it gives the same images."""
    path = make_tiny_sdxl(tmp_path / "sdxl")
    assert not is_other_pipeline(index_of(path))
    ours = DiffusionModel.load(path)
    pipeline = DiffusionPipeline.from_pretrained(path)
    theirs = PipelineModel(pipeline, source=str(path))
    assert theirs.process.grid(STEPS) == ours.process.grid(STEPS)
    assert theirs.rows_at(1, Guidance(SCALE)) == ours.rows_at(1, Guidance(SCALE)) == (1, 1)
    for options in ({}, {"guidance_rescale": 0.7}, {"sampler": "dpmpp_2m"}, {"eta": 1.0}):
        own_size = {"height": None, "width": None}
        images = [sample(model, PROMPTS, SEEDS, **own_size, **options) for model in (ours, theirs)]
        assert_close(images[1], images[0], rtol=0, atol=1e-5)


def test_sdxl_turbo_is_the_stock_pipeline_in_one_step(tmp_path: Path) -> None:
    """SDXL-Turbo as published: Euler ancestral, trailing, one step without guidance, which draws
    no noise. Diffusers starts it from sigma / sqrt(1 + sigma^2) of the noise; we start from all."""
    path, turbo = make_tiny_sdxl(tmp_path / "turbo"), {"timestep_spacing": "trailing"}
    saved = DiffusionPipeline.from_pretrained(path)
    scheduler = EulerAncestralDiscreteScheduler.from_config(saved.scheduler.config, **turbo)
    saved.scheduler = scheduler
    saved.save_pretrained(path)
    model, pipeline = DiffusionModel.load(path), DiffusionPipeline.from_pretrained(path)
    assert isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    one = {"num_steps": 1, "guidance_scale": 1.0, "height": None, "width": None}
    images = sample(model, PROMPTS, SEEDS, **one)
    sampled = sample(model, PROMPTS, SEEDS, sampler="euler_ancestral", **one)
    assert torch.equal(sampled, images)
    pipeline.scheduler.set_timesteps(1)
    sigma = pipeline.scheduler.sigmas[0]
    noise = model.noise(SEEDS) * (1 + sigma**2).sqrt() / sigma
    for row, prompt in enumerate(PROMPTS):
        stock = pipeline(
            prompt,
            num_inference_steps=1,
            guidance_scale=0.0,
            latents=noise[row : row + 1],
            output_type="pt",
        ).images
        assert_close(images[row : row + 1], stock, rtol=0, atol=1e-5)


def test_stable_diffusion_loads_as_diffusion_model(tmp_path: Path) -> None:
    assert not is_other_pipeline(index_of(make_tiny_pipeline(tmp_path / "sd")))
    assert index_of(tmp_path) is None
    ours = {"_class_name": ["pixel_pipeline", "PixelPipeline"], "unet": ["diffusers", "X"]}
    assert not is_other_pipeline(ours)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_half_precision_agrees_with_the_stock_pipeline(family: str, root: Path) -> None:
    """Latents go in as the loop has them; 16 roundings of bfloat16, .125, are the check's bound."""
    path, cpu = make(family, root / "half"), torch.device("cpu")
    sides = {"height": SIDE, "width": SIDE}
    model = load_pipeline(path, index_of(path) or {}, cpu, torch.bfloat16, **sides)
    assert model.latent_dtype == torch.bfloat16
    assert sample(model, PROMPTS[:1], SEEDS[:1]).dtype == torch.float32


def test_offloading_hooks_are_held_and_encoders_are_asked_once(root: Path) -> None:
    """The stock call frees its parts at its end; a prompt is encoded once for all of its images."""
    pipeline, freed, encoded = build("flux", root), [], []
    pipeline.maybe_free_model_hooks = lambda: freed.append(1)
    pipeline.text_encoder_2.register_forward_hook(lambda *_: encoded.append(1))
    model = PipelineModel(pipeline, SIDE, SIDE)
    before = len(encoded)
    sample(model, PROMPTS[:1] * 4, [0, 1, 2, 3], batch_size=2)
    assert not freed and len(encoded) == before + 2  # and the empty prompt, for noise and decoding


def test_weights_that_are_kept_aside_have_the_digest_of_those_in_place() -> None:
    """offload=sequential leaves meta tensors in a network, which have no values to digest."""
    part = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    part.register_parameter("scale", torch.nn.Parameter(torch.rand(2)))
    before = loaded_digest(b"", [part])
    cpu_offload(part, torch.device("cpu"))
    assert part[0].weight.is_meta and loaded_digest(b"", [part]) == before
