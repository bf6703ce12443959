"""Paths as users write them: ~ and environment variables, and whether something can be made there.

A config field whose type is `PathText` or `OutputText` holds a path, and is expanded where configs
are read. What may stand in place of a path - a hub id, a URL, a pipe: command - is not touched.
"""

import difflib
import os
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

CODE_ROOT = Path(__file__).resolve().parents[2]
"""The folder of the packages: a checkout, a run's frozen copy or an installed blackpoint."""
SHIPPED = ("assets", "configs")
"""Folders beside the packages that commands and configs name; they install with them."""

_REMOTE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_COMMAND = re.compile(r"(pipe|exec|cmd|popen|sh|bash|shell):|[|!]", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


class Holds(Enum):
    """Meaning of a config's text field, as a mark in its type."""

    PATH = "path"
    OUTPUT = "output"
    PROMPTS = "prompts"


PathText = Annotated[str, Holds.PATH]
"""A path, or a hub id, URL or command in place of one."""
OutputText = Annotated[str, Holds.PATH, Holds.OUTPUT]
"""A path that the verb makes."""


class BadPath(ValueError):
    """A path that means nothing here; the message is the reason and the remedy."""


def is_remote(text: str) -> bool:
    """Tells a URL, or a command, from a local path."""
    return _REMOTE.match(text) is not None


def is_command(text: str) -> bool:
    """Tells what a shell would run, however it is written."""
    return _COMMAND.match(text) is not None


def is_verbatim(text: str) -> bool:
    """Tells texts that stand in place of a path, which nobody expands."""
    return is_remote(text) or is_command(text)


def expanded(path: str) -> str:
    """Returns `path` with a leading ~ or ~user, $NAME and ${NAME} replaced, as a shell would.

    URLs and commands stay as they are, and so does ${...} that is no variable of the environment.
    Raises BadPath for a user who is not known, and for a $NAME that is not set where no such path
    exists as it is written.
    """
    if is_verbatim(path):
        return path
    result = path if _exists(Path(path)) else _VARIABLE.sub(_value, path)
    if not path.startswith("~"):
        return result
    home = os.path.expanduser(result)
    if home == result:
        user = path.split("/", 1)[0]
        raise BadPath(f"no home folder of {user} is known here; write the whole path")
    return home


def shipped(path: str) -> str:
    """Returns where a file of assets/ or configs/ lies that the working folder does not hold.

    Any other path is returned as it is: what the working folder holds comes first.
    """
    there = CODE_ROOT / path
    is_ours = path.startswith(tuple(f"{name}/" for name in SHIPPED))
    return str(there) if is_ours and not _exists(Path(path)) and _exists(there) else path


def inside(folder: Path, name: object) -> Path | None:
    """Returns the path of a name that a file of the folder gives; None where it leads out of it."""
    path = os.path.normpath(folder / name) if isinstance(name, str) and "\0" not in name else ""
    return Path(path) if Path(path).is_relative_to(os.path.normpath(folder)) else None


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name in os.environ:
        return os.environ[name]
    if match[1]:
        return match[0]
    raise BadPath(f"the environment variable {name} is not set; set it, or write the whole path")


def obstacle(path: Path) -> str | None:
    """Returns why no file or folder can be made at `path`, or None. Makes nothing itself.

    Says nothing of what is there already: whether that may be used is for the verb to say.
    """
    if "\0" in str(path):
        return "a name must not hold the character NUL"
    whole = Path(os.path.abspath(path))
    there = whole
    while not (is_there := _exists(there)) and there != there.parent:
        there = there.parent
    if not is_there:
        return None
    longest = os.pathconf(there, "PC_NAME_MAX")
    for name in path.parts:  # also of a folder that `..` leaves again
        if len(os.fsencode(name)) > longest:
            return f"a name of {len(os.fsencode(name))} bytes, where {longest} is the most"
    if there == whole:
        return None
    if not there.is_dir():
        return f"{there} is a file, and nothing can lie below it"
    if len(os.fsencode(whole)) > os.pathconf(there, "PC_PATH_MAX"):
        return f"a path of {len(os.fsencode(whole))} bytes is longer than the system takes"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"there is no right to write in {there}"
    return None


def nearly(path: Path) -> Path | None:
    """Returns what lies beside a path that does not exist under nearly its name, or None."""
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.name else []
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.parent / close[0] if close else None


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (OSError, ValueError):  # a name too long, a file on the way: what is above it decides
        return False
    return True
