"""Walking a folder of the user's: every file that is meant, in one order."""

import os
from collections.abc import Iterator
from pathlib import Path


def visible_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (directory relative to `folder`, sorted file names), following links once.

    Names that begin with a dot are left out, as are folders of such names: `._x.png` is no picture
    but what macOS keeps beside one. Raises OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    visited: set[tuple[int, int]] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        status = os.stat(directory)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            subfolders.clear()
            continue
        visited.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(directory, folder)
        yield (
            "" if relative == "." else relative,
            sorted(name for name in names if not name.startswith(".")),
        )
