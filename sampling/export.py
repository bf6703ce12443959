"""Writes a model as a diffusers folder that stock diffusers samples as we do.

The folder is built beside its destination, checked there against stock diffusers
(sampling/export_check.py), and renamed into place: the destination either holds a whole, proven
export or does not exist.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING

from sampling.errors import UserError
from sampling.export_check import check_against_diffusers
from sampling.model import DiffusionModel
from sampling.model_card import model_card

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass
class ExportConfig:
    """From a trained checkpoint to a diffusers folder."""

    checkpoint: str = MISSING
    """What to export: a run directory, a Lightning .ckpt, a diffusers folder or a hub id."""
    output: str = MISSING
    """Folder to write; must be empty or not exist."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a training checkpoint: their moving average or the last step's."""
    dtype: Dtype = "float32"
    """Number format of the written weights."""
    verify: bool = True
    """Reload the folder with stock diffusers and compare latents with our own samplers."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    verify: bool = True,
    dtype: Dtype = "float32",
) -> Path:
    """Writes `checkpoint` as a diffusers folder and returns the folder.

    Raises UserError where `output` is taken or `checkpoint` cannot be loaded, and RunFailed where
    stock diffusers does not sample the folder as we do; `output` then does not exist.
    """
    output = Path(output)
    require_empty(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DiffusionModel.load(checkpoint, dtype=getattr(torch, dtype), weights=weights)
    with moved_into_place(output) as folder:
        model.save(folder)
        card = model_card(model.process, weights, str(checkpoint), _run_dir_of(Path(checkpoint)))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if verify:
            check_against_diffusers(model.to(device), folder)
    return output


def require_empty(output: Path) -> None:
    """Raises UserError unless `output` is absent or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        kind = "a folder that is not empty" if output.is_dir() else "a file"
        raise UserError(
            f"output={output} is {kind}; nothing is overwritten: name a new folder or remove it"
        )


@contextlib.contextmanager
def moved_into_place(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that becomes `output` on success and vanishes otherwise."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the export from colleagues
        _flush_to_disk(folder)
        os.replace(folder, output)  # also replaces an empty folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_to_disk(folder: Path) -> None:
    """Waits until the files are on disk, so that a crash after the rename leaves no empty ones."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint path names or lies in, if any."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
