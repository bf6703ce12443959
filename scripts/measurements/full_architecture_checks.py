"""What stock diffusers makes of a full-size folder or file, each check in a process of its own.

    reload FOLDER SIDE                     its pipeline samples the folder
    compare BASE FILE FOLDER               a file of the base, read by diffusers and written as a
                                           folder again, has the base's bits
    ours BASE TENSORS SIDE                 writes embeddings, sizes, an output of the UNet and
                                           latents of a guided run of 2 steps, SIDE px
    stock BASE TENSORS SIDE DIFFERENCES    compares them with StableDiffusionXLPipeline's

The last two run one after the other, with the tensors kept on disk between them, and each holds the
text encoders before the UNet: two pipelines in float32 do not share 24 GB. Weights are the same
bits and operations those of the same libraries; a sum's order may differ with the address of its
terms, 2^-24 of each.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.sampling.checkpoints.ldm_keys import published_text_name
from blackpoint.sampling.checkpoints.loading import convert_weights, is_xl, text_encoders_of
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.sampling.export.verify import stock_pipeline_of_file
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.samplers import run
from blackpoint.scripts.measurements.full_architecture_verbs import PROMPT
from blackpoint.scripts.stand_alone import run_script

SIZES = PictureSize(1024, 768, 16, 32, 512, 384)
"""Of a picture that was resized and cropped, all six different."""
TIMESTEP, SEED, NUM_STEPS = 500, 0, 2
GUIDANCE = Guidance(scale=5.0, rescale=0.7)
SAMPLER = "euler"  # of the published folder
TOLERANCES = {
    "prompt_embeds": 1e-5,
    "pooled": 1e-5,
    "time_ids": 0.0,
    "output of the UNet": 1e-5,
    f"latents after {NUM_STEPS} steps": 1e-3,
}
"""Largest differences that pass, absolute, float32."""


def reload(folder: str, side: str) -> None:
    """Samples a folder with the pipeline that its model_index.json names."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    images = pipeline(
        PROMPT,
        num_inference_steps=NUM_STEPS,
        height=int(side),
        width=int(side),
        guidance_rescale=GUIDANCE.rescale,
        output_type="pt",
    ).images
    if not (torch.isfinite(images).all() and images.std() > 0):
        raise RunFailed(f"{folder}: its images are not finite, or constant")


def compare(base: str, file: str, unpacked: str) -> None:
    """Compares the weights of `base` with both readings of `file`, as bits.

    SDXL's autoencoder is float32 in files and folders that are written: numbers of float16 have
    one way to be float32.
    """
    first, second = PipelineFolder(Path(base)), PipelineFolder(Path(unpacked))
    index = first.read_json("model_index.json")
    third = stock_pipeline_of_file(Path(file), Path(base), is_xl(index))
    for part in ("unet", "vae", *text_encoders_of(index)):
        weights = first.weights(part)
        stock = getattr(third, part).state_dict()
        if part.startswith("text_encoder"):
            stock = {published_text_name(name): tensor for name, tensor in stock.items()}
        for reader, other in (("the folder", second.weights(part)), ("diffusers", stock)):
            if weights.keys() != other.keys():
                raise RunFailed(f"{part} of {reader} has other names than the base")
            for name, tensor in weights.items():
                given = other[name]
                formats = {tensor.dtype, torch.float32 if part == "vae" else tensor.dtype}
                bits = (t.float().view(torch.int32) for t in (tensor, given))
                if given.dtype not in formats or not torch.equal(*bits):
                    raise RunFailed(f"{part}.{name} of {reader} has other bits than the base")


@torch.no_grad()
def ours(base: str, output: str, side: str) -> None:
    """Writes what this package computes."""
    texts = DiffusionModel.load(base, with_unet=False)
    condition, empty = texts.encode_prompts([PROMPT]), texts.encode_prompts([""])
    del texts
    gc.collect()
    model = DiffusionModel.load(base)
    sized = condition.with_sizes([SIZES])
    noise = initial_noise([SEED], model.latent_shape(int(side), int(side)))
    denoise = model.denoiser(condition, empty, GUIDANCE)
    grid = model.process.grid(NUM_STEPS, SAMPLER)
    computed = (
        torch.cat([condition.prompt_embeds, empty.prompt_embeds]),
        torch.cat([_set(condition.pooled), _set(empty.pooled)]),
        _set(sized.time_ids),
        model.network(noise, torch.tensor([TIMESTEP]), sized),
        run(SAMPLER, denoise, grid, SampleState(noise)).x,
    )
    tensors = dict(zip(TOLERANCES, computed, strict=True))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)


def _set(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@torch.no_grad()
def stock(base: str, tensors: str, side: str, output: str) -> None:
    """Writes how far the stock pipeline is from `tensors`; raises RunFailed beyond TOLERANCES."""
    texts = _stock_parts(base, "unet", "vae")
    text, no_text, pooled, no_pooled = texts.encode_prompt(PROMPT, negative_prompt="")
    del texts
    gc.collect()
    pipeline = _stock_parts(base, "text_encoder", "text_encoder_2", "vae")
    height, width, top, left, *target = SIZES
    time_ids = pipeline._get_add_time_ids(
        (height, width), (top, left), tuple(target), torch.float32, pooled.shape[-1]
    )
    shape = (pipeline.unet.config.in_channels, *[int(side) // pipeline.vae_scale_factor] * 2)
    noise = initial_noise([SEED], shape)
    others = {"text_embeds": pooled, "time_ids": time_ids}
    predicted = pipeline.unet(noise, TIMESTEP, text, added_cond_kwargs=others).sample
    latents = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=no_text,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=no_pooled,
        height=int(side),
        width=int(side),
        latents=noise,
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE.scale,
        guidance_rescale=GUIDANCE.rescale,
        output_type="latent",
    ).images
    computed = (
        torch.cat([text, no_text]),
        torch.cat([pooled, no_pooled]),
        time_ids,
        predicted,
        latents,
    )
    read, rows = load_file(tensors), {}
    for (name, tolerance), tensor in zip(TOLERANCES.items(), computed, strict=True):
        rows[name] = {
            "largest": tensor.abs().max().item(),
            "difference": (tensor - read[name]).abs().max().item(),
            "tolerance": tolerance,
        }
    Path(output).write_text(json.dumps(rows, indent=1) + "\n", encoding="ascii")
    wrong = [name for name, row in rows.items() if not row["difference"] <= row["tolerance"]]
    if wrong:
        raise RunFailed(f"{', '.join(wrong)}: not those of diffusers; {output} has the differences")


def _stock_parts(base: str, *without: str) -> Any:
    """Loads the stock pipeline without some of its parts, and turns it to float32."""
    pipeline = DiffusionPipeline.from_pretrained(
        base,
        local_files_only=True,
        dtype=next(PipelineFolder(Path(base)).tensors("vae")).dtype,
        **dict.fromkeys(without),
    )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            convert_weights(part, torch.float32)
    return pipeline


CHECKS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (reload, compare, ours, stock)
}


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status."""
    name, *arguments = argv
    return run_script("full_architecture_checks", lambda: CHECKS[name](*arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
