"""Puts an export into its place: whole, over nothing that is there, open to colleagues.

What is half-written lies beside its place, and goes where the work fails.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors import SafetensorError

from blackpoint.data.files.errors import NOT_WRITABLE, RunFailed, UserError
from blackpoint.data.files.whole_file import new_files, whole_folder


def require_empty(output: Path) -> None:
    """Raises UserError unless `output` is absent or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        kind = "a folder that is not empty" if output.is_dir() else "a file"
        raise UserError(
            f"output={output} is {kind}; nothing is overwritten: name a new folder or remove it"
        )


def require_absent(output: Path, others: Sequence[Path]) -> None:
    """Raises UserError where the file `output`, or one of those to lie beside it, is there."""
    for path in (output, *others):
        if path.exists() or path.is_symlink():
            beside = "" if path == output else f": {path}, which is written beside it,"
            raise UserError(
                f"output={output}{beside} is there already; nothing is overwritten: name a new "
                "file or remove it"
            )


@contextlib.contextmanager
def moved_into_place(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that becomes `output` on success and vanishes otherwise.

    Raises UserError where nothing can be made there, and RunFailed where the disk takes no more.
    """
    with _into_place(output, whole_folder(output.resolve(), sync=True)) as folder:
        yield folder


@contextlib.contextmanager
def files_moved_into_place(output: Path) -> Iterator[Path]:
    """Yields a folder; the files written there move beside `output` together, `output` itself last.

    Raises as `moved_into_place` does, and UserError where one of them is there by then.
    """
    # A link to a folder on the way is followed; `output` itself is not there.
    resolved = output.parent.resolve() / output.name
    try:
        with _into_place(output, new_files(resolved)) as folder:
            yield folder
    except FileExistsError as error:
        raise UserError(
            f"output={output}: {error} is there by now; nothing is overwritten: name a "
            "new file or remove it"
        ) from error


@contextlib.contextmanager
def _into_place(output: Path, making: AbstractContextManager[Path]) -> Iterator[Path]:
    with contextlib.ExitStack() as entered:
        try:
            output.resolve().parent.mkdir(parents=True, exist_ok=True)
            folder = entered.enter_context(making)
        except OSError as error:
            raise UserError(
                f"output={output} can't be written: {error.strerror}; name a place where it can "
                "be made"
            ) from error
        try:
            with entered.pop_all():
                yield folder
                _open_to_colleagues(folder)
        except BaseException as error:
            if reason := _reason_not_written(error):
                raise RunFailed(
                    f"output={output} can't be written: {reason}. Nothing is left of it; make room "
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
