"""Proves that stock diffusers runs an exported folder as our own samplers run the model.

Popular trainers get everything right until the export: a scheduler_config.json that forgets the
prediction type, the spacing or the betas. So the written folder is loaded with the pipeline that
its model_index.json names and both sides sample the same noise, from the prompt on, with every
sampler that has a counterpart there (sampling/samplers.py); UniPC, which we do not have, must come
out finite and not constant.

Everything runs in float32, whatever the number format of the files, on few steps and small
latents: what is compared is arithmetic, and a wrong setting shows at the first step. Our samplers
run first and their model leaves before the folder is loaded: two never share the memory.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.memory import give_back_memory
from blackpoint.data.files.safetensors_file import read_header
from blackpoint.sampling.checkpoints.ldm_keys import UNET_PREFIX, VAE_PREFIX
from blackpoint.sampling.checkpoints.loading import convert_weights
from blackpoint.sampling.checkpoints.pipeline_folder import DTYPES, without_bars
from blackpoint.sampling.export.clients import diffusers_settings
from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import SAMPLERS, Counterpart, run

PROMPT, SEED = "a photo on a black background", 0
GUIDANCE = Guidance(scale=3.0, rescale=0.7)
MAX_NUM_STEPS, MAX_LATENT_SIZE = 5, 16
WITHOUT_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
GPU_SLACK = 10  # attention and convolution kernels there round in another order each time

STAND_IN = 2**-24
"""alpha_bar that diffusers puts in place of 0 at the last step, where it divides by alpha."""


def check_against_diffusers(
    model: DiffusionModel, folder: Path, file: Path | None = None
) -> dict[str, float]:
    """Returns the largest difference of the latents by scheduler; raises RunFailed on a mismatch.

    The weights are those of `folder`, or of the single file `file` with the configs of `folder` and
    the settings of the scheduler that a user is told to make. Uses `model` up: it is turned to
    float32, and its weights are dropped.
    """
    process, device = model.process, model.device
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    if file is not None:
        scheduler = DDIMScheduler.from_config(scheduler.config, **diffusers_settings(process))
    failures = config_failures(process, dict(scheduler.config))
    alpha_bar_error = _largest(scheduler.alphas_cumprod.double() - process.schedule.alpha_bar)
    if not alpha_bar_error <= 1e-6:
        failures.append(f"alpha_bar differs by {alpha_bar_error:.2g}, more than 1e-06")
    if failures:
        _fail(failures)
    noise = _noise(model)
    differences: dict[str, float] = {}
    with _full_float32(), torch.no_grad():
        ours = our_latents(model, scheduler, noise)
        prompt = check_prompt(model)
        for part in model.loaded_parts():
            part.to("meta")
        give_back_memory()
        pipeline = _stock_pipeline(folder, device, model, file)
        if file is not None:
            pipeline.scheduler = scheduler
        pipeline_latents = partial(
            _stock_latents, pipeline, prompt, noise, num_check_steps(process)
        )
        for counterpart, latents in ours.items():
            name = counterpart.title
            differences[name] = _largest(pipeline_latents(counterpart.scheduler) - latents)
            tolerance = _tolerance(counterpart, process, latents)
            if not differences[name] <= tolerance:
                failures.append(
                    f"{name}: latents differ by {differences[name]:.2g}, more than {tolerance:.2g}"
                )
        latents = pipeline_latents("UniPCMultistepScheduler")
        if not (torch.isfinite(latents).all() and latents.std() > 1e-3):
            failures.append("UniPC: latents are not finite, or constant")
    if failures:
        _fail(failures)
    return differences


def _tolerance(counterpart: Counterpart, process: Process, latents: Tensor) -> float:
    at_zero_snr = process.schedule.is_zero_terminal_snr
    tolerance = counterpart.zero_snr_tolerance if at_zero_snr else counterpart.tolerance
    slack = 1 if latents.device.type == "cpu" else GPU_SLACK
    return tolerance * max(1.0, _largest(latents)) * slack


def sampled_once(model: DiffusionModel) -> Tensor:
    """Returns latents by one sampler, to compare models of ours by; turns `model` to float32."""
    scheduler = DDIMScheduler.from_config(model.process.to_diffusers())
    with _full_float32(), torch.no_grad():
        [latents] = our_latents(model, scheduler, _noise(model), ["euler"]).values()
    return latents


def our_latents(
    model: DiffusionModel, scheduler: Any, noise: Tensor, samplers: Iterable[str] = tuple(SAMPLERS)
) -> dict[Counterpart, Tensor]:
    """Samples `noise` with each sampler that has a counterpart, on the timesteps of that scheduler.

    Turns `model` to float32 in place.
    """
    process = model.process
    model.load_encoders()
    for part in model.loaded_parts():
        convert_weights(part, torch.float32)
    condition, empty = model.encode_prompts([check_prompt(model)]), model.encode_prompts([""])
    latents = {}
    for sampler in samplers:
        counterpart = SAMPLERS[sampler].counterpart
        is_linspace = process.timestep_spacing == "linspace"
        if counterpart is None or (is_linspace and not counterpart.walks_linspace):
            continue
        # Read from the scheduler: for leading and linspace their DPM++ has a list of its own.
        theirs = getattr(diffusers, counterpart.scheduler).from_config(scheduler.config)
        theirs.set_timesteps(num_check_steps(process))
        schedule = process.schedule
        if counterpart.has_stand_in and schedule.is_zero_terminal_snr:
            schedule = schedule.with_terminal_alpha_bar(STAND_IN)
        timesteps = [int(t) for t in theirs.timesteps]
        grid = SamplingGrid.of(schedule, timesteps, process.final_alpha_bar(sampler))
        starts_at_sigma = counterpart.starts_at_sigma and process.timestep_spacing != "leading"
        start = noise * grid.sigma[0] if starts_at_sigma else noise
        walker = copy.copy(model)
        walker.process = replace(process, schedule=schedule)
        denoise = walker.denoiser(condition, empty, GUIDANCE)
        latents[counterpart] = run(sampler, denoise, grid, SampleState(start)).x
    return latents


def check_prompt(model: DiffusionModel) -> str:
    """Returns a prompt that the model knows: a text, its first class, or nothing."""
    if model.pixels is None or model.pixels.has_text:
        return PROMPT
    return model.pixels.classes[0] if model.pixels.classes else ""


def config_failures(process: Process, config: dict[str, Any]) -> list[str]:
    """Lists the keys of the reloaded scheduler config that contradict the process."""
    expected = process.to_diffusers()
    return [
        f"scheduler_config.json: {key} is {config.get(key)!r}, must be {value!r}"
        for key, value in expected.items()
        if not key.startswith("_") and config.get(key) != value
    ]


def num_check_steps(process: Process) -> int:
    """Returns the most steps, up to 5, whose list all diffusers schedulers walk as it is written.

    Trailing needs S to divide T (their DDIM steps by T // S); linspace needs S - 1 to divide T - 1
    (their Euler takes fractional timesteps).
    """
    total = process.schedule.num_steps
    for num_steps in range(min(MAX_NUM_STEPS, total), 1, -1):
        match process.timestep_spacing:
            case "trailing":
                fits = total % num_steps == 0
            case "linspace":
                fits = (total - 1) % (num_steps - 1) == 0
            case _:
                fits = True
        if fits:
            return num_steps
    return 1


def _stock_pipeline(
    folder: Path, device: torch.device, model: DiffusionModel, file: Path | None = None
) -> Any:
    """Loads the folder; a pixel-space model with the pipeline file that lies beside it."""
    if file is not None:
        pipeline = stock_pipeline_of_file(file, folder, model.is_xl)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                convert_weights(part, torch.float32)
    else:
        kind, settings = _stock_class(model.is_xl)
        if model.pixels is not None:
            kind, settings = DiffusionPipeline, {"trust_remote_code": True}
        offline = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
        settings = settings | offline
        with without_bars():
            pipeline = kind.from_pretrained(folder, **settings)
    pipeline = pipeline.to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pipeline_of_file(file: Path, configs: Path, is_xl: bool) -> Any:
    """Loads a single file as diffusers does with the configs of a folder, without a network.

    In the number formats of the file: its tensors are mapped and not copied. from_single_file knows
    one format for all parts, and the autoencoder of an SDXL may have one of its own.
    """
    kind, settings = _stock_class(is_xl)
    formats = read_header(file).formats
    unet, vae = (
        DTYPES[next(one for key, one in formats.items() if key.startswith(prefix))]
        for prefix in (UNET_PREFIX, VAE_PREFIX)
    )
    options: dict[str, Any] = {"config": str(configs), "local_files_only": True}
    if vae != unet:
        settings = settings | {
            "vae": AutoencoderKL.from_single_file(str(file), subfolder="vae", dtype=vae, **options)
        }
    return kind.from_single_file(str(file), dtype=unet, **options, **settings)


def _stock_class(is_xl: bool) -> tuple[Any, dict[str, Any]]:
    """Returns the pipeline's class, and what it must be told to give latents and no more."""
    if is_xl:
        return StableDiffusionXLPipeline, {"add_watermarker": False}
    return StableDiffusionPipeline, WITHOUT_CHECKER


def _stock_latents(
    pipeline: Any, prompt: str, noise: Tensor, num_steps: int, scheduler: str
) -> Tensor:
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    latents: Tensor = pipeline(
        prompt,
        height=noise.shape[-2] * pipeline.vae_scale_factor,
        width=noise.shape[-1] * pipeline.vae_scale_factor,
        latents=noise,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE.scale,
        guidance_rescale=GUIDANCE.rescale,
        output_type="latent",
    ).images
    return latents


def _noise(model: DiffusionModel) -> Tensor:
    """Draws noise for an image as small as the check can do with and the model can take."""
    multiple = model.size_multiple
    small = max(MAX_LATENT_SIZE * model.downsampling_factor // multiple, 1) * multiple
    side = min(model.image_size, small)
    return initial_noise([SEED], model.latent_shape(side, side)).to(model.device)


def _largest(values: Tensor) -> float:
    return float("nan") if torch.isnan(values).any() else values.abs().max().item()


def _fail(failures: list[str]) -> None:
    raise RunFailed(
        "the export was not written: stock diffusers does not run it as we do.\n  "
        + "\n  ".join(failures)
    )


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Switches TensorFloat-32 off: its 10-bit mantissa would drown the differences."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
