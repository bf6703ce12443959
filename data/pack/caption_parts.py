"""Tables of captions in several files: parts of one data set, whole or not.

Files of one kind are parts of one table without being asked for if their names say so, as
train-00000-of-00004.parquet does, in one folder or spread over several; and Parquet files of one
folder whose names differ in a number alone, as in 0000.parquet. All others may as well be splits or
versions of a data set: the user names them by a pattern.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from blackpoint.data.files.errors import UserError
from blackpoint.data.pack.image_folder import suffix_of, walk

# train-00000-of-00004 (some versions of datasets append a hash), 0000, part.0
_OF = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<total>\d+)(?:-[0-9a-f]+)?")
_NUMBERED = re.compile(r"(?P<stem>(?:.*[^0-9])?)(?P<number>\d{2,})|(?P<part>.*part[-_.]?)\d+")


class Parts(NamedTuple):
    """Tables that are one; the paths are sorted."""

    paths: tuple[Path, ...]
    pattern: str
    """The user's name for them, relative to the folder."""
    names: tuple[str, ...]
    """Of each path, however it was written: relative to the folder, absolute where it lies
    elsewhere."""

    def shown(self, folder: Path) -> str:
        """Returns the name, or how many parts there are."""
        first, last = (relative_to(path, folder) for path in (self.paths[0], self.paths[-1]))
        return first if len(self.paths) == 1 else f"{len(self.paths)} parts {first} to {last}"


def grouped(tables: Iterable[Path], folder: Path) -> list[Parts]:
    """Groups tables into those that are one; raises UserError where parts are missing."""
    groups: dict[tuple[str, str, str, Path | None], list[Path]] = {}
    for path in sorted(tables):
        (stem, total), suffix = _stem(path), suffix_of(path.name)
        if not total and suffix != "parquet":
            stem = path.stem  # two versions of a CSV have such names, too
        where = None if total else path.parent
        groups.setdefault((stem, total, suffix, where), []).append(path)
    tables_of_one = []
    for (_, total, _, _), group in groups.items():
        for paths in _sets(group) if total else [group]:
            pattern = _pattern(paths, folder)
            if total:
                _check_whole(paths, total, pattern, folder)
            names = tuple(relative_to(path, folder) for path in paths)
            tables_of_one.append(Parts(tuple(paths), pattern, names))
    return tables_of_one


def common_pattern(tables: Sequence[Parts], folder: Path) -> str | None:
    """Returns a pattern for several tables that are called alike; None if they are not."""
    paths = [path for parts in tables for path in parts.paths]
    kinds = {(*_stem(path), suffix_of(path.name)) for path in paths}
    return _pattern(paths, folder) if len(tables) > 1 and len(kinds) == 1 else None


def _sets(paths: Sequence[Path]) -> list[list[Path]]:
    """Splits parts by folder if folders share a number: each holds a set of its own."""
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    num_alone = sum(len(set(map(_number, group))) for group in by_folder.values())
    is_one = num_alone == len(set(map(_number, paths)))
    return [list(paths)] if is_one else list(by_folder.values())


def _pattern(paths: Sequence[Path], folder: Path) -> str:
    """Returns the user's name of parts, relative to `folder`."""
    if len(paths) == 1:
        return relative_to(paths[0], folder)
    (stem, total), name = _stem(paths[0]), glob.escape(paths[0].name)
    if any(path.name != paths[0].name for path in paths):
        ending = f"-of-{total}*" if total else ""
        name = f"{glob.escape(stem)}[0-9]*{ending}{paths[0].suffix}"
    is_one_folder = len({path.parent for path in paths}) == 1
    where = glob.escape(relative_to(paths[0].parent, folder)) if is_one_folder else "**"
    return name if where == "." else f"{where}/{name}"


def named(pattern: str, folder: Path) -> Parts:
    """Returns the tables that `pattern`, relative to `folder` or absolute, names."""
    whole = os.path.join(glob.escape(str(folder)), pattern)
    paths = [folder / pattern]
    if not os.path.isfile(paths[0]):
        paths = [Path(name) for name in glob.glob(whole, recursive=True) if os.path.isfile(name)]
    if not paths:
        raise UserError(
            f"captions_file={pattern}: no such file in source={folder}; name a table of captions, "
            "relative to source, or several with a pattern such as 'train-*.parquet'"
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
    """Returns the common name of parts, and their number; "" if unknown."""
    match = _OF.fullmatch(path.stem)
    if match:
        return match["stem"], match["total"]
    match = _NUMBERED.fullmatch(path.stem)
    return (match["part"] or match["stem"] or "", "") if match else (path.stem, "")


def _number(path: Path) -> int:
    match = _OF.fullmatch(path.stem)
    assert match, "only names with a total are asked for their number"
    return int(match["number"])


def _check_whole(paths: Sequence[Path], total: str, pattern: str, folder: Path) -> None:
    by_number = {_number(path): path for path in paths}
    absent = sorted(set(range(int(total))) - set(by_number))
    if absent:
        raise UserError(
            f"source={folder}: {len(absent)} of {int(total)} parts of {pattern} are missing, "
            f"first number {absent[0]:0{len(total)}d}; fetch them, or take those that are "
            f"there with captions_file={pattern!r}"
        )
    if len(by_number) < len(paths):
        twice = next(path for path in paths if by_number[_number(path)] != path)
        names = f"{relative_to(twice, folder)}, {relative_to(by_number[_number(twice)], folder)}"
        raise UserError(
            f"source={folder}: a part of {pattern} is there twice ({names}); remove those of one "
            f"version, or take all with captions_file={pattern!r}"
        )
