"""Folders for what is half-written, beside where it will lie: only what is whole is moved out.

    PARENT/.partial-<host>-<process id>-<random>

A process removes its own. One that is killed can't: the next that makes such a folder there, on
the same machine, does.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".partial-"


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yields a new folder in `parent`, removed afterwards; raises OSError if it can't be made."""
    prefix = f"{PREFIX}{os.uname().nodename}-"
    for left in parent.glob(f"{prefix}*"):
        if not _is_alive(left.name[len(prefix) :].partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{prefix}{os.getpid()}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, ValueError):  # another user's, or no name of ours
        return True
    return True
