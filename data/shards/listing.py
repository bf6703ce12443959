"""Which local shards a config means: a folder, one .tar, a brace or a wildcard pattern."""

import glob
import os
from pathlib import Path

from braceexpand import braceexpand

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import is_remote
from blackpoint.data.images.decode import IMAGE_SUFFIXES

ENCODING_FILE = "encoding.json"
EMPTY_FILE = "empty.safetensors"


def folder_shards(folder: Path) -> list[Path]:
    """Returns the .tar files of a folder, sorted, without hidden ones (`._x.tar` of macOS)."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def is_encoded(shard_folder: Path) -> bool:
    """Tells whether the shards of a folder hold latents instead of images."""
    return (shard_folder / ENCODING_FILE).exists()


def find_shards(pattern: str, field: str = "data.shards") -> list[Path]:
    """Returns the shards that `pattern` names, sorted, all of one folder.

    Raises UserError, which names `field`, if there are none or one is absent.
    """
    if is_remote(pattern):
        raise UserError(f"{field}={pattern}: only local paths are read; copy the shards here")
    is_folder = os.path.isdir(pattern)  # False for a list of braces that is too long for a name
    shards = folder_shards(Path(pattern)) if is_folder else _expand(pattern, field)
    if not shards:
        raise UserError(f"{field}={pattern}: {_what_is_there(Path(pattern))}; {_remedy(pattern)}")
    absent = [path for path in shards if not os.path.isfile(path)]
    if absent:
        raise UserError(
            f"{field}={pattern}: {len(absent)} of {len(shards)} shards do not exist, "
            f"first {absent[0]}; {_remedy(str(absent[0].parent))}"
        )
    other = [path for path in shards if path.suffix != ".tar"]
    if other:
        raise UserError(f"{field}={pattern}: {other[0]} is no .tar file; shards are plain tars")
    folders = sorted({path.parent for path in shards})
    if len(folders) > 1:
        raise UserError(
            f"{field}={pattern}: names shards of {len(folders)} folders ({folders[0]}, "
            f"{folders[1]}); one data set is one folder: put or link the shards into one"
        )
    return shards


def expand_braces(pattern: str, field: str) -> list[str]:
    """Returns the expansion of a pattern with braces; raises UserError, which names `field`."""
    try:
        return list(braceexpand(pattern, escape=not is_remote(pattern)))
    except ValueError:
        raise UserError(f"{field}={pattern}: the braces do not match") from None


def _expand(pattern: str, field: str) -> list[Path]:
    names = expand_braces(pattern, field)
    shards = []
    for name in names:
        is_there = os.path.exists(name)
        if glob.has_magic(name) and not is_there:
            shards += sorted(glob.glob(name))
        elif len(names) > 1 or is_there:
            shards.append(name)
    return sorted({Path(name) for name in shards})


def _what_is_there(path: Path) -> str:
    if not os.path.isdir(path):
        return "does not exist" if not glob.has_magic(str(path)) else "matches no file"
    suffixes = {child.suffix[1:].lower() for child in path.iterdir()}
    if suffixes & set(IMAGE_SUFFIXES):
        return "is a folder of images, not of .tar shards"
    return "holds no .tar shards"


def _remedy(output: str) -> str:
    return f"make shards with `blackpoint data pack source=IMAGES output={output}`"
