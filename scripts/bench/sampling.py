"""Sampling in the benchmark: `sample()` against the UNet calls alone and diffusers' own pipeline.

All take the same prompts, seeds, steps, guidance and rescale, in one batch. The bare contestant
calls the UNet on both branches of guidance and throws the result away. One runs our loop with the
UNet's answer at hand, which shows what the loop adds where the machine drifts by more than that.
The pipeline is StableDiffusionPipeline with a DDIMScheduler of the same process. Before the clock
starts, its images and ours are compared: they must be the same work.

Any other pipeline is driven step by step: beside its own call, a FLUX with random weights and given
embeddings, whose step costs what it does on real models beside what a call costs.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.checkpoints.encoders import dtype_of
from blackpoint.sampling.conditioning import joined
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.pipelines.model import PipelineModel
from blackpoint.sampling.samplers import run
from blackpoint.scripts.bench.timing import Row, Seconds, ratio_row, row, time_round
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.target_process import fine_tuned_process

GUIDANCE = Guidance(7.5, 0.7)
LARGEST_DIFFERENCE = 0.05  # of pixels in [0, 1]; an untrained process amplifies rounding
UNET, LOOP, AROUND = "unet_calls", "loop", "around"
SAMPLE, PIPELINE = "sample", "pipeline"
NAMES = {
    UNET: "UNet calls alone",
    LOOP: "our sampler loop",
    AROUND: "our sampler loop, the UNet's answer given",
    SAMPLE: "our sample(), with prompts and decode",
    PIPELINE: "diffusers' pipeline",
}
OURS, STOCK = "ours", "stock"
PIPELINE_NAMES = {OURS: "our sample(), a call per step", STOCK: "the pipeline's own call"}
WIDTH, NUM_TOKENS, SIDE_PX, SCALE, NUM_IMAGES = 64, 64, 256, 3.5, 2
PIPELINE_DIFFERENCE = 1e-4
COMPARED = (
    (LOOP, UNET, 1.02),
    (AROUND, UNET, 0.02),
    (SAMPLE, UNET, 1.02),
    (PIPELINE, UNET, None),
    (SAMPLE, PIPELINE, 1.0),
)


def contestants(
    config: TrainConfig, num_images: int, num_steps: int
) -> dict[str, Callable[[], object]]:
    """Returns what is timed by name, over one model with the fine-tune's process."""
    model = DiffusionModel.load(str(config.checkpoint))
    model.process = fine_tuned_process(config, model.process)
    prompts = itertools.islice(itertools.cycle(config.preview.prompts), num_images)
    return contestants_of(model, list(prompts), num_steps)


def contestants_of(
    model: DiffusionModel, prompts: list[str], num_steps: int
) -> dict[str, Callable[[], object]]:
    """Returns what is timed by name, over one model, on its device and in its number format."""
    num_images, device = len(prompts), model.device
    seeds = list(range(num_images))
    noise = initial_noise(seeds, model.latent_shape()).to(device)
    grid = model.process.grid(num_steps)
    conditional = model.encode_prompts(prompts)
    empty = model.encode_prompts([""] * num_images)
    both = joined([empty, conditional]).to(dtype_of(model.unet))
    others = both.unet_arguments(*model.image_sides)
    denoise = model.denoiser(conditional, empty, GUIDANCE)
    doubled = torch.cat([noise, noise]).to(dtype_of(model.unet))

    @torch.no_grad()
    def unet_calls() -> None:
        for t in grid.timesteps:
            steps = torch.full((2 * num_images,), t, device=device)
            model.unet(doubled, steps, both.prompt_embeds, **others, return_dict=False)

    @torch.no_grad()
    def loop() -> None:
        run("ddim", denoise, grid, SampleState(noise))

    def given(x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (doubled[: len(x)],)

    def around() -> None:
        unet, model.unet = model.unet, given
        try:
            loop()
        finally:
            model.unet = unet

    def sample() -> torch.Tensor:
        return model.sample(
            prompts,
            seeds,
            num_steps=num_steps,
            guidance_scale=GUIDANCE.scale,
            guidance_rescale=GUIDANCE.rescale,
            batch_size=num_images,
        )

    pipeline = _pipeline(model, prompts, seeds, num_steps)
    parts = {UNET: unet_calls, LOOP: loop, AROUND: around}
    return {**parts, SAMPLE: sample, PIPELINE: pipeline}


def pipeline_of(model: DiffusionModel) -> Any:
    """Returns diffusers' pipeline of a model and its process."""
    parts: dict[str, Any] = {
        "vae": model.vae,
        "text_encoder": model.text_encoder,
        "tokenizer": model.tokenizer,
        "unet": model.unet,
        "scheduler": DDIMScheduler.from_config(model.process.to_diffusers()),
    }
    if model.is_xl:
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=model.text_encoder_2,
            tokenizer_2=model.tokenizers[1],
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline(
    model: DiffusionModel, prompts: list[str], seeds: list[int], num_steps: int
) -> Callable[[], torch.Tensor]:
    pipeline = pipeline_of(model)

    def call() -> torch.Tensor:
        return pipeline(
            prompts,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE.scale,
            guidance_rescale=GUIDANCE.rescale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images

    return call


def time_sampling(config: TrainConfig, num_images: int, num_steps: int, rounds: int) -> Seconds:
    """Returns the seconds of each contestant, one per round; raises RunFailed if images differ."""
    parts = contestants(config, num_images, num_steps)
    ours, theirs = parts[SAMPLE](), parts[PIPELINE]()
    assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    check_same_images(ours, theirs, LARGEST_DIFFERENCE)
    seconds: Seconds = {}
    time_round(parts, 0, {})
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


def check_same_images(ours: torch.Tensor, theirs: torch.Tensor, most: float) -> None:
    """Raises RunFailed where images differ by more than `most`."""
    difference = (ours - theirs).abs().max().item()
    if not difference <= most:
        raise RunFailed(
            f"our images and the pipeline's differ by up to {difference:.2g}, more than {most}: "
            "they are not the same work, so there is nothing to compare"
        )


def sampling_rows(seconds: Seconds, num_images: int) -> list[Row]:
    """Returns seconds per image of all, and ratios to the UNet calls and to the pipeline."""
    group = "sampling"
    rows = [
        row(group, text, "s/image", [s / num_images for s in seconds[name]])
        for name, text in NAMES.items()
    ]
    for name, base, bound in COMPARED:
        what = f"{NAMES[name]} / {NAMES[base]} (seconds)"
        rows.append(ratio_row(group, what, seconds[name], seconds[base], at_most=bound))
    return rows


def flux() -> Any:
    """Returns a random FLUX of 512 channels whose prompts have given embeddings."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    texts: Any = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **texts)

    pipeline.encode_prompt = given_embeddings
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def given_embeddings(prompt: Any, **_: Any) -> tuple[torch.Tensor, ...]:
    """Returns what FLUX's `encode_prompt` does, of any prompt."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    embeds = torch.ones(count, NUM_TOKENS, WIDTH)
    return embeds, torch.ones(count, WIDTH), torch.zeros(NUM_TOKENS, 3)


def pipeline_contestants(num_steps: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns what is timed by name, over the same weights."""
    pipeline = flux()
    driven = FluxPipeline(**pipeline.components)
    driven.encode_prompt = given_embeddings
    model = PipelineModel(driven, SIDE_PX, SIDE_PX)
    prompts, seeds = ["a photo"] * NUM_IMAGES, list(range(NUM_IMAGES))
    size: dict[str, Any] = {"height": SIDE_PX, "width": SIDE_PX}

    def ours() -> torch.Tensor:
        return model.sample(prompts, seeds, num_steps, SCALE, 0.0, batch_size=NUM_IMAGES, **size)

    def stock() -> torch.Tensor:
        images: torch.Tensor = pipeline(
            prompts,
            num_inference_steps=num_steps,
            guidance_scale=SCALE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="pt",
            **size,
        ).images
        return images

    return {OURS: ours, STOCK: stock}


def time_pipelines(num_steps: int, rounds: int) -> Seconds:
    """Returns the seconds of each contestant, one per round; raises RunFailed if images differ."""
    parts = pipeline_contestants(num_steps)
    check_same_images(parts[OURS](), parts[STOCK](), PIPELINE_DIFFERENCE)
    seconds: Seconds = {}
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


def pipeline_rows(seconds: Seconds, num_steps: int) -> list[Row]:
    """Returns seconds per step of both, their ratio, and what ours adds per step."""
    group = "pipelines of diffusers"
    rows = [
        row(group, text, "s/step", [s / num_steps for s in seconds[name]])
        for name, text in PIPELINE_NAMES.items()
    ]
    pairs = zip(seconds[OURS], seconds[STOCK], strict=True)
    added = [1e3 * (ours - stock) / num_steps for ours, stock in pairs]
    what = f"{PIPELINE_NAMES[OURS]} / {PIPELINE_NAMES[STOCK]} (seconds)"
    rows.append(ratio_row(group, what, seconds[OURS], seconds[STOCK], at_most=1.05))
    rows.append(row(group, "added per step", "ms", added))
    return rows
