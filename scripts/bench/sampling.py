"""Sampling in the benchmark: `sample()` against the UNet calls alone and diffusers' own pipeline.

All take the same prompts, seeds, steps, guidance and rescale, in one batch. The bare contestant
calls the UNet on both branches of guidance and throws the result away. One runs our loop with the
UNet's answer at hand, which shows what the loop adds where the machine drifts by more than that.
The pipeline is StableDiffusionPipeline with a DDIMScheduler of the same process. Before the clock
starts, its images and ours are compared: they must be the same work.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
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
    prompts = [
        config.preview.prompts[number % len(config.preview.prompts)] for number in range(num_images)
    ]
    seeds = list(range(num_images))
    noise = initial_noise(seeds, model.latent_shape())
    grid = model.process.grid(num_steps)
    conditional = model.encode_prompts(prompts)
    empty = model.encode_prompts([""] * num_images)
    both = torch.cat([empty.prompt_embeds, conditional.prompt_embeds])
    denoise = model.denoiser(conditional, empty, GUIDANCE)
    doubled = torch.cat([noise, noise])

    @torch.no_grad()
    def unet_calls() -> None:
        for t in grid.timesteps:
            model.unet(doubled, torch.full((2 * num_images,), t), both, return_dict=False)

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


def pipeline_of(model: DiffusionModel) -> StableDiffusionPipeline:
    """Returns diffusers' pipeline of a model and its process."""
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.process.to_diffusers()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
    difference = (ours - theirs).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE:
        raise RunFailed(
            f"our images and the pipeline's differ by up to {difference:.3f}, more than "
            f"{LARGEST_DIFFERENCE}: they are not the same work, so there is nothing to compare"
        )
    seconds: Seconds = {}
    time_round(parts, 0, {})
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


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
