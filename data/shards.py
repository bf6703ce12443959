"""Which shards a config means: a folder, one .tar, a brace or a wildcard pattern."""

import glob
import re
from pathlib import Path

from braceexpand import braceexpand

from data.decode import IMAGE_SUFFIXES
from data.errors import UserError

ENCODING_FILE = "encoding.json"


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
    if re.match(r"(pipe|[a-z0-9]{2,}):", pattern):
        raise UserError(f"{field}={pattern}: only local paths are read. Copy the shards here.")
    is_folder = Path(pattern).is_dir()
    shards = folder_shards(Path(pattern)) if is_folder else _expand(pattern, field)
    if not shards:
        raise UserError(f"{field}={pattern}: {_what_is_there(Path(pattern))} {_remedy(pattern)}")
    absent = [path for path in shards if not path.is_file()]
    if absent:
        raise UserError(
            f"{field}={pattern}: {len(absent)} of {len(shards)} shards do not exist, "
            f"first {absent[0]}. {_remedy(str(absent[0].parent))}"
        )
    other = [path for path in shards if path.suffix != ".tar"]
    if other:
        raise UserError(f"{field}={pattern}: {other[0]} is no .tar file. Shards are plain tars.")
    folders = sorted({path.parent for path in shards})
    if len(folders) > 1:
        raise UserError(
            f"{field}={pattern}: names shards of {len(folders)} folders ({folders[0]}, "
            f"{folders[1]}). One data set is one folder: put or link the shards into one."
        )
    return shards


def _expand(pattern: str, field: str) -> list[Path]:
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{field}={pattern}: the braces do not match.") from None
    shards = []
    for name in names:
        if glob.has_magic(name):
            shards += sorted(glob.glob(name))
        elif len(names) > 1 or Path(name).exists():
            shards.append(name)
    return sorted({Path(name) for name in shards})


def _what_is_there(path: Path) -> str:
    if not path.is_dir():
        return "does not exist." if not glob.has_magic(str(path)) else "matches no file."
    suffixes = {child.suffix[1:].lower() for child in path.iterdir()}
    if suffixes & set(IMAGE_SUFFIXES):
        return "is a folder of images, not of .tar shards."
    return "holds no .tar shards."


def _remedy(output: str) -> str:
    return f"Make shards with `blackpoint data pack source=IMAGES output={output}`."
