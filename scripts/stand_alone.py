"""Commands of their own, `python -m blackpoint.scripts.ROOM.NAME [key=value ...]`."""

import sys
from collections.abc import Callable

from blackpoint.data.files.errors import Resumable, RunFailed, UserError


def run_script(name: str, body: Callable[[], object]) -> int:
    """Runs a script; returns the exit status: 2 for wrong input, 75 where a signal stopped what the
    same command continues, 1 for a failure, each a line."""
    try:
        body()
    except (UserError, RunFailed, Resumable) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 75 if isinstance(error, Resumable) else 1
    return 0
