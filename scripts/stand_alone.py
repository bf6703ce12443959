"""Commands of their own, `python -m blackpoint.scripts.ROOM.NAME [key=value ...]`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import Resumable, RunFailed, UserError
from blackpoint.data.files.whole_file import write_whole


def run_script(name: str, body: Callable[[], object]) -> int:
    """Runs a script; returns the exit status: 2 for wrong input, 75 where a signal stopped what the
    same command continues, 1 for a failure, each a line."""
    try:
        body()
    except (UserError, RunFailed, Resumable) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 75 if isinstance(error, Resumable) else 1
    return 0


def write_page(output: str, page: str, content: Any = None) -> None:
    """Writes and prints a page, output.md, and its data, output.json."""
    if content is not None:
        write_whole(Path(f"{output}.json"), json.dumps(content, indent=1) + "\n")
    write_whole(Path(f"{output}.md"), page)
    print(page)
