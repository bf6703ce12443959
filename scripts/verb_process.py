"""Verbs in processes of their own, of the same code as this process, whatever the folder holds.

`python -m` would put the working folder first on the path, where packages of the user may be called
like ours. This file is what is run instead, and what a training with several devices runs again.
"""

import sys
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).resolve()


def verb_command(*arguments: str) -> list[str]:
    """Returns the command of `blackpoint ARGUMENTS`, for subprocess."""
    return [sys.executable, str(FILE), *arguments]


if "blackpoint" not in sys.modules:  # run as a file, or again by a process that spawned
    sys.path = [path for path in sys.path if path != str(FILE.parent)]  # Python put it first
    sys.modules["blackpoint"] = code = ModuleType("blackpoint")
    code.__path__ = [str(FILE.parents[1])]

if __name__ == "__main__":
    from blackpoint.scripts.cli import entry

    entry()
