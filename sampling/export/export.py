"""Writes a model as a diffusers folder that stock diffusers samples as we do.

The folder is built beside its destination, checked there against stock diffusers
(sampling/export/verify.py), and renamed into place: the destination either holds a whole, proven
export or does not exist.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from blackpoint.data.files.errors import NOT_WRITABLE, NotExportable, RunFailed, UserError
from blackpoint.data.files.whole_file import whole_folder
from blackpoint.sampling.choices import Dtype, Weights
from blackpoint.sampling.export.clients import Architecture
from blackpoint.sampling.export.model_card import model_card
from blackpoint.sampling.export.verify import check_against_diffusers
from blackpoint.sampling.model import DiffusionModel


def export(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    verify: bool = True,
    dtype: Dtype = "float32",
    variant: str | None = None,
) -> Path:
    """Writes `checkpoint` as a diffusers folder and returns the folder.

    Raises UserError where `output` is taken or `checkpoint` cannot be loaded, NotExportable where
    its process can't pass `verify`, and RunFailed where stock diffusers does not sample the folder
    as we do or the disk is full; `output` then does not exist.
    """
    output = Path(output)
    require_empty(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DiffusionModel.load(
        checkpoint, dtype=getattr(torch, dtype), weights=weights, variant=variant
    )
    if verify and (reason := model.process.not_exported()):
        raise NotExportable(f"checkpoint={checkpoint}: {reason}")
    with moved_into_place(output) as folder:
        model.save(folder)
        run_dir = _run_dir_of(Path(checkpoint))
        architecture = Architecture.of(model.unet, model.pixels is not None)
        card = model_card(
            model.process, weights, str(checkpoint), run_dir, model.pixels, architecture
        )
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
    """Yields a folder beside `output` that becomes `output` on success and vanishes otherwise.

    Raises UserError where nothing can be made there, and RunFailed where the disk takes no more.
    """
    given, output = output, output.resolve()
    with contextlib.ExitStack() as entered:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder = entered.enter_context(whole_folder(output, sync=True))
        except OSError as error:
            raise UserError(
                f"output={given} can't be written: {error.strerror}; name a folder that can be made"
            ) from error
        try:
            with entered.pop_all():
                yield folder
                _open_to_colleagues(folder)
        except BaseException as error:
            if reason := _reason_not_written(error):
                raise RunFailed(
                    f"output={given} can't be written: {reason}. Nothing is left of it; make room "
                    "and run the same command again, or name another output"
                ) from error
            raise


def _reason_not_written(error: BaseException) -> str:
    """Returns the system's message if the disk failed, else nothing."""
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return error.strerror or str(error)
    # safetensors has one class for all its errors, and passes the system's words on.
    words = "I/O error: "
    return str(error).partition(words)[2] if isinstance(error, SafetensorError) else ""


def _open_to_colleagues(folder: Path) -> None:
    """Gives the usual rights: safetensors makes files 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint path names or lies in, if any."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
