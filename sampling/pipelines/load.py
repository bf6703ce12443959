"""Finds and loads a pipeline of diffusers, and has it compared with itself before it is used.

What is Stable Diffusion 1.x, 2.x or XL, or of our own, is no matter of this file
(sampling/model.py).
"""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from blackpoint.data.files.errors import Resumable, UserError
from blackpoint.sampling.checkpoints.pipeline_folder import without_bars
from blackpoint.sampling.checkpoints.resolve import HUB_ID, hub_errors, resolve
from blackpoint.sampling.guidance import NO_GUIDANCE, Guidance
from blackpoint.sampling.pipelines.agreement import check_agreement
from blackpoint.sampling.pipelines.call import Arguments
from blackpoint.sampling.pipelines.model import PipelineModel

log = logging.getLogger(__name__)

INDEX = "model_index.json"
OWN = ("StableDiffusion", "PixelPipeline")
"""Beginnings of the classes with a UNet that DiffusionModel takes, or refuses with its reasons."""


def index_of(checkpoint: str | Path) -> dict[str, Any] | None:
    """Reads the model_index.json of a folder, or of a hub id that can be had; None without one."""
    path = Path(checkpoint)
    if not path.exists() and HUB_ID.fullmatch(str(checkpoint)):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):  # resolve() says what is wrong with it
            path = Path(hf_hub_download(str(checkpoint), INDEX)).parent
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def is_other_pipeline(index: Mapping[str, Any] | None) -> bool:
    """Whether a model_index.json is of a pipeline that DiffusionModel does not know."""
    if index is None or "_class_name" not in index:
        return False
    name = index["_class_name"]  # with code of its own in the folder: [module, class]
    name = str(name[-1] if isinstance(name, list) and name else name)
    return "transformer" in index or not ("unet" in index and name.startswith(OWN))


def load_pipeline(
    checkpoint: str | Path,
    index: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    offload: str = "none",
    num_steps: int = 2,
    guidance: Guidance = NO_GUIDANCE,
    **options: Any,
) -> PipelineModel:
    """Loads any text-to-image pipeline; `options` are those of PipelineModel.

    It is compared with the stock pipeline, at this guidance (agreement.py). Raises UserError with
    the reason where it cannot be driven, or does not agree.
    """
    kind = _class_of(checkpoint, index)
    Arguments(kind, options.get("arguments") or {}, str(checkpoint))  # before weights are read
    schedulers = [name for name in index if name.endswith("scheduler")]
    if len(schedulers) > 1:
        raise UserError(
            f"checkpoint={checkpoint} is a {kind.__name__}, a cascade with {len(schedulers)} "
            f"schedulers ({', '.join(schedulers)}): one noise does not decide its image; give a "
            "pipeline of one stage"
        )
    folder, of_files = checkpoint, {"variant": variant, "use_safetensors": True}
    if not Path(checkpoint).exists():
        folder = download_pipeline(str(checkpoint), variant, index)
    with _reasons(checkpoint, "cannot be loaded"):
        without = {name: None for name in ("safety_checker",) if name in index}
        with without_bars():
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **of_files, **without)
    _place(pipeline, device, offload)
    with _reasons(checkpoint, f"({kind.__name__}) cannot be driven by prompts and latents alone"):
        model = PipelineModel(pipeline, source=str(checkpoint), **options)
        check_agreement(model, guidance, num_steps)
    diffusers.utils.logging.set_verbosity_error()  # what it warns of, it would at every step
    if model.one_prompt_per_batch:
        log.warning("note: %s pads prompts to the longest: one prompt per batch", kind.__name__)
    return model


def download_pipeline(
    hub_id: str, variant: str | None = None, index: Mapping[str, Any] | None = None
) -> Path:
    """Returns the folder in the hub's cache of a pipeline of any kind, once its files are there.

    Raises what `resolve` raises.
    """
    if not is_other_pipeline(index or index_of(hub_id)):
        return resolve(hub_id, variant=variant).pipeline.path
    with hub_errors(hub_id):
        return Path(DiffusionPipeline.download(hub_id, variant=variant, use_safetensors=True))


def _class_of(checkpoint: str | Path, index: Mapping[str, Any]) -> type:
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise UserError(
            f"checkpoint={checkpoint} is a {index.get('_class_name')}, which is no pipeline of the "
            f"installed diffusers {diffusers.__version__}; give one that is, or another version"
        )
    return kind


def _place(pipeline: Any, device: torch.device, offload: str) -> None:
    if offload == "none":
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise UserError(f"offload={offload} moves parts to a GPU, and device is cpu; leave it out")
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


@contextlib.contextmanager
def _reasons(checkpoint: str | Path, what: str) -> Any:
    """Turns what a pipeline raises for a call that does not suit it into UserError."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError, Resumable):
        raise
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else "no message"
        raise UserError(
            f"checkpoint={checkpoint} {what} ({type(error).__name__}: {reason}); give a "
            "text-to-image pipeline of diffusers"
        ) from error
