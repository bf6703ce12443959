"""A folder of images: the walk through it, the files beside an image, and the key of a sample."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from blackpoint.data.caption_text import Captions
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.walk import visible_files
from blackpoint.data.images.decode import IMAGE_SUFFIXES

EITHER_CASE = tuple(case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper()))
SIDECAR_SUFFIXES = ("txt", "caption", "json")
_TWIN_ENDINGS = tuple(f".{suffix}" for suffix in EITHER_CASE)


class CaptionedFile(NamedTuple):
    """One image on disk and its captions; `name` is relative to the folder, fit to print."""

    key: str
    name: str
    path: Path
    captions: Captions
    row: int | None = None
    """Of an image inside a Parquet file, `path`: its row, from 0."""
    num_bytes: int = 0
    """Of such an image: the mean of its row group."""


@dataclass
class FolderCount:
    """Contents of a folder, by kind."""

    num_images: int = 0
    num_sidecars: dict[str, int] = field(default_factory=dict)
    """Files beside an image that may hold its caption, by suffix."""
    other_suffixes: dict[str, int] = field(default_factory=dict)
    """All files but images, and but .txt beside an image."""


def count_files(folder: Path) -> FolderCount:
    """Counts images, files that have an image beside them, and files of other suffixes."""
    count = FolderCount()
    for _, names in walk(folder):
        for name in names:
            suffix = suffix_of(name)
            if suffix in IMAGE_SUFFIXES:
                count.num_images += 1
                continue
            is_sidecar = suffix in SIDECAR_SUFFIXES and has_image_beside(names, name)
            if is_sidecar:
                count.num_sidecars[suffix] = count.num_sidecars.get(suffix, 0) + 1
            if not is_sidecar or suffix != "txt":
                count.other_suffixes[suffix] = count.other_suffixes.get(suffix, 0) + 1
    return count


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (directory relative to `folder`, sorted file names), following links once."""
    try:
        yield from visible_files(folder)
    except OSError as error:
        raise UserError(
            f"source={folder}: cannot read {error.filename}: {error.strerror}"
        ) from None


def sample_key(folder: Path, name: str) -> str:
    """Returns the WebDataset key of image `name` (relative to `folder`).

    It is the name without its suffix. WebDataset ends a key at the first dot, so dots inside are
    written %2E (and % as %25); when several images differ only in their suffix, and for a suffix
    such as Jpg, whose others are not looked for, "%suffix" follows.
    """
    path = PurePosixPath(name)
    stem = path.with_suffix("").name
    directory = folder / path.parent
    num_twins = sum(os.path.exists(directory / f"{stem}.{suffix}") for suffix in EITHER_CASE)
    return _key(path, num_twins)


def sample_key_among(siblings: Sequence[str], name: str) -> str:
    """Returns the same of an image whose `siblings`, of the same stem, are known."""
    return _key(PurePosixPath(name), sum(sibling.endswith(_TWIN_ENDINGS) for sibling in siblings))


def row_key(table: str, row: int) -> str:
    """Returns the key of the image in a row of a Parquet file, named relative to the folder."""
    return f"{_escaped(PurePosixPath(table))}/{row:08d}"


def _key(path: PurePosixPath, num_twins: int) -> str:
    key, suffix = _escaped(path), path.suffix[1:]
    return key if num_twins <= 1 and suffix in EITHER_CASE else f"{key}%{suffix}"


def _escaped(path: PurePosixPath) -> str:
    key = str(path.with_suffix("")).replace("%", "%25").replace(".", "%2E")
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def same_stem(names: Sequence[str], name: str) -> list[str]:
    """Returns those of the sorted `names` that differ from `name` only in their suffix."""
    stem = os.path.splitext(name)[0]
    siblings = []
    for number in range(bisect_left(names, f"{stem}."), len(names)):
        if not names[number].startswith(f"{stem}."):
            break
        if os.path.splitext(names[number])[0] == stem:
            siblings.append(names[number])
    return siblings


def has_image_beside(names: Sequence[str], name: str) -> bool:
    """Tells whether one of the sorted `names` is an image that shares the stem of `name`."""
    return any(suffix_of(sibling) in IMAGE_SUFFIXES for sibling in same_stem(names, name))


def suffix_of(name: str) -> str:
    """Returns the suffix of a name, lower case, without its dot."""
    return os.path.splitext(name)[1][1:].lower()


def printable(name: str) -> str:
    """Returns a file's name fit for UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
