"""Proves that a single file is read back as it was written: by this package and by diffusers.

Every tensor has the bits of the model's, and one noise is sampled from each reading, in float32,
with the scheduler that the report names for diffusers (sampling/export/client_report.py). Models
leave the memory before the next one comes.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.memory import give_back_memory
from blackpoint.sampling.checkpoints.ldm_keys import published_text_name
from blackpoint.sampling.checkpoints.loading import TOKENIZERS, save_tokenizer
from blackpoint.sampling.checkpoints.saving import (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    write_json,
)
from blackpoint.sampling.export.clients import as_carried, of_xl
from blackpoint.sampling.export.verify import (
    check_against_diffusers,
    sampled_once,
    stock_pipeline_of_file,
)
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The last in SDXL alone."""
PUBLISHED = Process(
    NoiseSchedule.scaled_linear(), "epsilon", "leading", set_alpha_to_one=False
).to_diffusers()
"""The scheduler config that diffusers finds for any Stable Diffusion file."""
ROUNDING = 1e-5
"""Of latents of one noise by the same weights, relative to the largest: at another address in
memory products of matrices are summed in another order, each step's rounded by 2^-24."""
Digests = dict[str, bytes]


def check_single_file(model: DiffusionModel, file: Path) -> dict[str, float]:
    """Returns the largest difference of latents by scheduler; raises RunFailed on a mismatch.

    Uses `model` up: its weights are dropped.
    """
    dtype, process = model.unet.dtype, as_carried(model.process)
    model.process = process
    written = tensor_digests(model)
    with tempfile.TemporaryDirectory() as folder:
        configs = Path(folder)
        save_configs(model, configs)
        latents = sampled_once(model)
        for part in model.loaded_parts():
            part.to("meta")
        give_back_memory()
        with _without_notes():  # of a path that nobody knows
            again = DiffusionModel.load(file, dtype=dtype)
        again.load_encoders()
        _require_equal("blackpoint", written, tensor_digests(again))
        _require_process(process, again.process)
        again.process = process  # no file says the spacing and the end of the timesteps
        pipeline = stock_pipeline_of_file(file, configs, model.is_xl)
        _require_equal("diffusers", written, tensor_digests(pipeline))
        del pipeline
        give_back_memory()  # its parts hold each other
        difference = (sampled_once(again) - latents).abs().max().item()
        if not difference <= ROUNDING * max(1.0, latents.abs().max().item()):
            _fail(f"blackpoint samples latents that differ by {difference:.2g}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return check_against_diffusers(again.to(device), configs, file)


def tensor_digests(parts: Any) -> Digests:
    """Returns a digest of the bits of each weight, by part and published name."""
    digests = {}
    for part in PARTS if of_xl(parts.unet.config) else PARTS[:-1]:
        module: nn.Module = getattr(parts, part)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():  # position_ids come and go with versions
                name = published_text_name(name) if part.startswith("text_encoder") else name
                bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                said = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
                digests[f"{part}.{name}"] = hashlib.blake2b(said + bits.tobytes()).digest()
    return digests


def save_configs(model: DiffusionModel, folder: Path) -> None:
    """Writes a pipeline folder without weights, for from_single_file to need no network.

    Its scheduler is the published one, as where diffusers looks for itself.
    """
    model.unet.save_config(folder / "unet")
    model.vae.save_config(folder / "vae")
    for (part, name), tokenizer in zip(TOKENIZERS.items(), model.tokenizers, strict=False):
        getattr(model, part).config.save_pretrained(folder / part)
        save_tokenizer(tokenizer, folder, name)
    write_json(folder / "scheduler" / "scheduler_config.json", PUBLISHED)
    index = STABLE_DIFFUSION_XL if model.is_xl else STABLE_DIFFUSION
    write_json(folder / "model_index.json", index)


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _require_equal(reader: str, written: Digests, read: Digests) -> None:
    wrong = sorted(
        name for name in written.keys() | read.keys() if written.get(name) != read.get(name)
    )
    if wrong:
        _fail(f"{reader} reads {len(wrong)} weights otherwise than written, such as {wrong[0]}")


def _require_process(written: Process, read: Process) -> None:
    is_same_type = written.prediction_type == read.prediction_type
    if not (is_same_type and written.schedule.is_close(read.schedule)):
        _fail(
            f"blackpoint reads {read.prediction_type} and alpha_bar[T - 1] "
            f"{read.schedule.alpha_bar[-1].item():.2g} of a model of {written.prediction_type} and "
            f"{written.schedule.alpha_bar[-1].item():.2g}"
        )


def _fail(reason: str) -> None:
    raise RunFailed(f"the single file was not written: {reason}")
