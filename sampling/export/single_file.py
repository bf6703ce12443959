"""Writes a model as one .safetensors file in the layout of latent-diffusion, and what goes with it.

    NAME.safetensors   weights; the empty tensors `v_pred` and `ztsnr` where they are true of it;
                       ModelSpec 1.0.1 (Stability-AI/ModelSpec) in the header
    NAME.yaml          the config of latent-diffusion, or generative-models, of a v-prediction model
                       (ldm_config.py)
    NAME.txt           what each client recognises, and what its user must choose (clients.py)

The three take their places together, after the file has been read back and compared (verify_file).
"""

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.ldm_keys import Part, is_open_clip, to_ldm
from blackpoint.sampling.checkpoints.prediction_evidence import V_STATISTIC
from blackpoint.sampling.export.carried import check_carried
from blackpoint.sampling.export.client_report import file_report
from blackpoint.sampling.export.clients import LDM_TYPES, Architecture, of_xl
from blackpoint.sampling.export.ldm_config import ldm_yaml
from blackpoint.sampling.export.placement import files_moved_into_place, require_absent
from blackpoint.sampling.export.tensor_file import write_tensors
from blackpoint.sampling.export.verify_file import check_single_file
from blackpoint.sampling.model import DiffusionModel

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Single files of other kinds, which run code where they are loaded."""
PARTS: tuple[Part, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The last in SDXL alone."""


def is_single_file(output: Path) -> bool:
    """Whether a name asks for a single file rather than a folder; UserError for a pickle's."""
    suffix = output.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"output={output}: {suffix} files are pickles, which can run any code when they "
            f"are loaded, and are not written; end the name in {SUFFIX}, which every client reads"
        )
    return suffix == SUFFIX


def beside(output: Path) -> tuple[Path, Path]:
    """Returns the paths of the config and of the report that go with a single file."""
    return output.with_suffix(".yaml"), output.with_suffix(".txt")


def require_free(output: Path) -> None:
    """Raises UserError where the file, or what goes with it, is there already."""
    require_absent(output, beside(output))


def write_single_file(
    model: DiffusionModel, output: Path, checkpoint: str, verify: bool, merged: Sequence[str] = ()
) -> None:
    """Writes `model` in the number format that it has; `merged` are LoRA files in it.

    Raises UserError where a single file can't carry the model or one of the files is there, and
    RunFailed where it is not read back as it was written or the disk is full; then none is written.
    With `verify` the model is used up.
    """
    require_free(output)
    check_carried(model, checkpoint)
    architecture = Architecture.of(model.unet)
    yaml_path, report_path = beside(output)
    merged_from = {"modelspec.merged_from": ", ".join([checkpoint, *merged])} if merged else {}
    report = file_report(output.name, model.process, architecture)
    with files_moved_into_place(output) as folder:
        file = folder / output.name
        tensors = single_file_tensors(model)
        write_tensors(file, tensors, modelspec(model, output.stem) | merged_from)
        del tensors
        if model.process.prediction_type == "v_prediction":
            (folder / yaml_path.name).write_text(ldm_yaml(model), encoding="utf-8")
        (folder / report_path.name).write_text(report, encoding="utf-8")
        if verify:
            check_single_file(model, file)
    warn_of_statistic(model, architecture)


def single_file_tensors(model: DiffusionModel) -> dict[str, Tensor]:
    """Returns the weights by their names in a single file, and the markers of the process."""
    tensors: dict[str, Tensor] = {}
    is_xl = of_xl(model.unet.config)
    for part in PARTS if is_xl else PARTS[:-1]:
        module = getattr(model, part)
        config = module.config.to_dict() if part.startswith("text_encoder") else module.config
        state = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
        tensors |= to_ldm(part, config, state, is_xl)
    return tensors | markers(model)


def markers(model: DiffusionModel) -> dict[str, Tensor]:
    """Returns the empty tensors by which clients know the process, where they are true of it."""
    process = model.process
    is_so = {
        "v_pred": process.prediction_type == "v_prediction",
        "ztsnr": process.schedule.is_zero_terminal_snr,
    }
    return {name: torch.tensor([]) for name, true in is_so.items() if true}


def modelspec(model: DiffusionModel, title: str) -> dict[str, str]:
    """Returns the entries of the header but for the hash, which the writer knows."""
    process = model.process
    height, width = model.image_sides
    is_v = process.prediction_type == "v_prediction"
    architecture = "stable-diffusion-v1"
    if is_open_clip(model.text_encoder.config.to_dict()):
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    if of_xl(model.unet.config):
        architecture = "stable-diffusion-xl-v1-base"
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    hint = f"{process.prediction_type}, {process.timestep_spacing} timesteps"
    if process.schedule.is_zero_terminal_snr:
        hint += ", zero terminal SNR, guidance rescale 0.7"
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{width}x{height}",
        "date": now.isoformat().replace("+00:00", "Z"),
        "description": "exported by blackpoint",
        "usage_hint": hint,
        "prediction_type": LDM_TYPES.get(process.prediction_type, "sample").replace(
            "eps", "epsilon"
        ),
        "timestep_range": f"0,{process.schedule.num_steps}",
    }
    return {"format": "pt", **{f"modelspec.{key}": value for key, value in entries.items()}}


def warn_of_statistic(model: DiffusionModel, architecture: Architecture) -> None:
    """Says on stderr that two clients take an SD 2 model for another kind than it is."""
    statistic = architecture.statistic
    if statistic is not None and architecture.guess != model.process.prediction_type:
        log.warning(
            "note: ComfyUI, and Forge without NAME.yaml, take this SD 2 model for %s, because the "
            "standard deviation of one bias is %.3f (v-prediction above %s); the report says what "
            "to set",
            architecture.guess,
            statistic,
            V_STATISTIC,
        )
