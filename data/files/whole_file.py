"""Files that are whole or as they were before, whatever stops the process that writes them."""

import contextlib
import os
import re
from pathlib import Path

_UNFINISHED = re.compile(rf"\..+\.{re.escape(os.uname().nodename)}\.(\d+)\.tmp")
_cleared: set[str] = set()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside `path` and renames; text as UTF-8. Makes the folder where it is absent.

    The first time that a process writes in a folder, it removes what killed ones left there.
    """
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
                os.replace(unfinished, path)
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
