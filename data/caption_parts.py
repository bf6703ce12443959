"""Tables of captions in several files: parts of one data set, whole or not.

Files of one kind are parts of one table if their names differ in a number alone, as in
train-00000-of-00004.parquet, 0000.parquet or part.0.csv, or not at all, in different folders.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import UserError
from data.image_folder import suffix_of, walk

# train-00000-of-00004 (some versions of datasets append a hash), 0000, part.0
_OF = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<total>\d+)(?:-[0-9a-f]+)?")
_NUMBERED = re.compile(r"(?P<stem>(?:.*[^0-9])?)(?P<number>\d{2,})|(?P<part>.*part[-_.]?)\d+")


class Parts(NamedTuple):
    """Tables that are one; the paths are sorted."""

    paths: tuple[Path, ...]
    pattern: str
    """What the user can name them by, relative to the folder."""
    names: tuple[str, ...]
    """Of each path, however it was written: relative to the folder, absolute where it lies
    elsewhere."""

    def shown(self, folder: Path) -> str:
        """Returns the name, or how many parts there are."""
        first, last = (relative_to(path, folder) for path in (self.paths[0], self.paths[-1]))
        return first if len(self.paths) == 1 else f"{len(self.paths)} parts {first} to {last}"


def grouped(tables: Iterable[Path], folder: Path) -> list[Parts]:
    """Groups tables into those that are one; raises UserError where parts are missing."""
    groups: dict[tuple[str, str, str], list[Path]] = {}
    for path in sorted(tables):
        stem, total = _stem(path)
        groups.setdefault((stem, total, suffix_of(path.name)), []).append(path)
    found = []
    for (stem, total, suffix), paths in groups.items():
        pattern = relative_to(paths[0], folder)
        if len(paths) > 1:
            parents = {path.parent for path in paths}
            where = relative_to(paths[0].parent, folder) if len(parents) == 1 else "**"
            number = "[0-9]*" if paths[0].stem != stem else ""
            name = f"{stem}{number}{f'-of-{total}*' if total else ''}.{suffix}"
            pattern = name if where == "." else f"{where}/{name}"
            _check_whole(paths, total, pattern, folder)
        elif total:
            _check_whole(paths, total, pattern, folder)
        names = tuple(relative_to(path, folder) for path in paths)
        found.append(Parts(tuple(paths), pattern, names))
    return found


def named(pattern: str, folder: Path) -> Parts:
    """Returns the tables that `pattern`, relative to `folder` or absolute, names."""
    whole = os.path.join(glob.escape(str(folder)), pattern)
    paths = [folder / pattern]
    if not os.path.isfile(paths[0]):
        paths = [Path(name) for name in glob.glob(whole, recursive=True) if os.path.isfile(name)]
    if not paths:
        raise UserError(
            f"captions_file={pattern}: no such file in source={folder}. Name a table of captions, "
            "relative to source, or several with a pattern such as 'train-*.parquet'."
        )
    by_name = dict(zip(_names_within(paths, folder), paths, strict=True))
    names = sorted(by_name, key=Path)
    return Parts(tuple(by_name[name] for name in names), pattern, tuple(names))


def _names_within(paths: Sequence[Path], folder: Path) -> list[str]:
    """Returns each path as the walk through `folder` meets it; absolute where it lies elsewhere."""
    directories: dict[tuple[int, int], str] = {}
    wanted = {_identity(path.parent) for path in paths}
    for directory, _ in walk(folder):
        identity = _identity(folder / directory)
        if identity in wanted:
            directories[identity] = directory
            if len(directories) == len(wanted):
                break
    names = []
    for path in paths:
        real = Path(os.path.realpath(path.parent))
        # Not met: in a hidden folder, or elsewhere.
        elsewhere = relative_to(real, Path(os.path.realpath(folder)))
        names.append(os.path.join(directories.get(_identity(real), elsewhere), path.name))
    return names


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def relative_to(path: Path, folder: Path) -> str:
    """Returns `path` relative to `folder`, whole where it lies elsewhere."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _stem(path: Path) -> tuple[str, str]:
    """Returns what the names of parts share, and how many parts there are; "" if unknown."""
    match = _OF.fullmatch(path.stem)
    if match:
        return match["stem"], match["total"]
    match = _NUMBERED.fullmatch(path.stem)
    return (match["part"] or match["stem"] or "", "") if match else (path.stem, "")


def _check_whole(paths: Sequence[Path], total: str, pattern: str, folder: Path) -> None:
    if not total:
        return
    for parent in {path.parent for path in paths}:
        own = [path for path in paths if path.parent == parent]
        numbers = {int(match["number"]) for path in own if (match := _OF.fullmatch(path.stem))}
        absent = sorted(set(range(int(total))) - numbers)
        if absent:
            raise UserError(
                f"source={folder}: {len(absent)} of {int(total)} parts of {pattern} are missing, "
                f"first number {absent[0]:0{len(total)}d}. Fetch them, or take those that are "
                f"there with captions_file={pattern!r}."
            )
