"""Files that are whole or as they were before, whatever stops the process that writes them."""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = re.compile(rf"\..+\.{re.escape(os.uname().nodename)}\.(\d+)\.tmp")
_cleared: set[str] = set()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside `path` and renames; text as UTF-8. Makes the folder where it is absent.

    The first time that a process writes in a folder, it removes what killed ones left there.
    """
    _write(path, content, os.replace)


def write_new(path: Path, content: str | bytes) -> None:
    """As `write_whole`, for one of several processes alone; FileExistsError where `path` exists."""
    _write(path, content, _move_to_new)


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


def _write(path: Path, content: str | bytes, move: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.path.abspath(path.parent)
    if folder not in _cleared:
        _cleared.add(folder)
        remove_unfinished(path.parent)
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        for is_last in (False, True):
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
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


def remove_unfinished(folder: Path) -> None:
    """Removes the files in `folder` that processes of this machine were killed in writing."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for match in [_UNFINISHED.fullmatch(entry.name) for entry in entries]:
            if match and not _is_alive(int(match[1])):
                (folder / match[0]).unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process has such a number
        return True
    return True
