"""Writes a model as a diffusers folder that stock diffusers samples as we do, or as a single file.

What is written is built beside its destination, checked there against stock diffusers
(sampling/export/verify.py), and renamed into place: the destination either holds a whole, proven
export or does not exist.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from blackpoint.data.files.errors import NotExportable
from blackpoint.sampling.choices import PLAIN, AutoDtype, Dtype, LoraFile, SingleFileConfig, Weights
from blackpoint.sampling.export.clients import Architecture
from blackpoint.sampling.export.model_card import model_card
from blackpoint.sampling.export.placement import moved_into_place, require_empty
from blackpoint.sampling.export.single_file import is_single_file, require_free, write_single_file
from blackpoint.sampling.export.verify import check_against_diffusers
from blackpoint.sampling.model import DiffusionModel


def export(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    verify: bool = True,
    dtype: AutoDtype = "auto",
    variant: str | None = None,
    single_file: SingleFileConfig = PLAIN,
    loras: Sequence[LoraFile] | None = None,
) -> Path:
    """Writes `checkpoint` as a diffusers folder, or as a single file NAME.safetensors; returns it.

    Raises UserError where `output` is taken or `checkpoint` cannot be loaded or be held by a single
    file, NotExportable where its process can't pass `verify`, and RunFailed where stock diffusers
    does not sample what is written as we do or the disk is full; `output` then does not exist.
    """
    output = Path(output)
    (require_free if is_single_file(output) else require_empty)(output)
    torch_dtype = getattr(torch, written_dtype(output, dtype))
    model = DiffusionModel.load(
        checkpoint,
        dtype=torch_dtype,
        weights=weights,
        variant=variant,
        single_file=single_file,
        loras=loras,
    )
    merged = [str(lora) for lora in loras or ()]
    if is_single_file(output):
        write_single_file(model, output, str(checkpoint), verify, merged)
    else:
        _write_folder(model, output, str(checkpoint), weights, verify, merged)
    return output


def written_dtype(output: Path, dtype: AutoDtype) -> Dtype:
    """Returns the number format of the weights: auto is float16 in a single file, else float32."""
    if dtype != "auto":
        return dtype
    return "float16" if is_single_file(output) else "float32"


def _write_folder(
    model: DiffusionModel,
    output: Path,
    checkpoint: str,
    weights: Weights,
    verify: bool,
    merged: Sequence[str],
) -> None:
    if verify and (reason := model.process.not_exported()):
        raise NotExportable(f"checkpoint={checkpoint}: {reason}")
    with moved_into_place(output) as folder:
        model.save(folder)
        run_dir = _run_dir_of(Path(checkpoint))
        architecture = Architecture.of(model.unet, model.pixels is not None)
        card = model_card(
            model.process, weights, checkpoint, run_dir, model.pixels, architecture, merged
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if verify:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            check_against_diffusers(model.to(device), folder)


def _run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint path names or lies in, if any."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
