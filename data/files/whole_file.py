"""Files and folders that are whole or as they were before, whatever stops who writes them.

They are written beside their place and renamed. What is half-written bears the machine and the
process that writes it; the next process of that machine that writes there removes what killed ones
have left:

    .NAME.<random>.<host>.<process id>.tmp      a file
    .partial-<host>-<process id>-<random>/      a folder
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blackpoint.data.files.signals import is_alive

FOLDER_PREFIX = ".partial-"
_HOST = re.escape(os.uname().nodename)
# Whole names, for a machine's name may be the beginning or the end of another's.
_UNFINISHED = re.compile(rf"\..+\.[0-9a-f]{{8}}\.{_HOST}\.(\d+)\.tmp")
_SCRATCH = re.compile(rf"{re.escape(FOLDER_PREFIX)}{_HOST}-(\d+)-[0-9a-f]{{32}}")
_cleared: set[str] = set()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file; text as UTF-8. Makes the folder where it is absent."""
    _write(path, content, os.replace)


def write_new(path: Path, content: str | bytes) -> None:
    """As `write_whole`, for one of several processes alone; FileExistsError where `path` exists."""
    _write(path, content, _move_to_new)


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yields a path to write, which becomes the file `path`; removed where the block raises.

    `sync`: it is on the disk before it has its name.
    """
    unfinished = _beside(path)
    try:
        yield unfinished
        if sync:
            flush_to_disk([unfinished])
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yields a folder that becomes `path`, absent or empty; removed where the block raises."""
    with scratch_folder(path.parent) as scratch:
        folder = scratch / path.name
        folder.mkdir()
        yield folder
        if sync:
            flush_to_disk(folder.rglob("*"))
        os.replace(folder, path)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yields a new folder in `parent`, removed afterwards; raises OSError if it can't be made."""
    for left in parent.glob(f"{FOLDER_PREFIX}*"):
        match = _SCRATCH.fullmatch(left.name)
        if match and not is_alive(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)
    name = f"{FOLDER_PREFIX}{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex}"
    folder = parent / name
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Yields a folder whose files move into that of `path` together, `path` itself last.

    FileExistsError where one is there, and then none of them is moved.
    """
    with scratch_folder(path.parent) as scratch:
        yield scratch
        flush_to_disk(scratch.iterdir())
        moved: list[Path] = []
        try:
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == path.name):
                place = path.parent / file.name
                try:
                    _move_to_new(file, place)
                except FileExistsError as error:
                    raise FileExistsError(str(place)) from error
                moved.append(place)
        except BaseException:
            for place in moved:
                place.unlink(missing_ok=True)
            raise


def remove_whole(path: Path) -> None:
    """Removes a file or a folder, which loses its name first: what has a name is whole."""
    if not path.name.startswith("."):
        hidden = path.with_name(f".removed-{path.name}.tmp")
        os.replace(path, hidden)
        path = hidden
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Waits until files are on the disk, so that a crash after a rename leaves no empty ones."""
    for path in sorted(paths):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_unfinished(folder: Path) -> None:
    """Removes the files in `folder` that processes of this machine were killed in writing."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for match in [_UNFINISHED.fullmatch(entry.name) for entry in entries]:
            if match and not is_alive(int(match[1])):
                (folder / match[0]).unlink(missing_ok=True)


def _write(path: Path, content: str | bytes, move: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        for is_last in (False, True):
            unfinished.write_bytes(
                content.encode(errors="backslashreplace") if isinstance(content, str) else content
            )
            try:
                move(unfinished, path)
                break
            except FileNotFoundError:  # a container of this machine's name took us for dead
                if is_last:
                    raise
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """Returns the folder where `path` grows; clears leftovers there, once per process."""
    folder = os.path.abspath(path.parent)
    if folder not in _cleared:
        _cleared.add(folder)
        remove_unfinished(path.parent)
    process = f"{os.uname().nodename}.{os.getpid()}"
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{process}.tmp")


def _move_to_new(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if path.exists():
            raise FileExistsError(str(path)) from error
        os.replace(unfinished, path)
    else:
        unfinished.unlink()
