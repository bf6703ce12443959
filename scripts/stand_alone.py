"""Commands of their own, `python -m blackpoint.scripts.ROOM.NAME [key=value ...]`, and pages."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import Resumable, RunFailed, UserError
from blackpoint.data.files.whole_file import write_whole

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors", "webdataset")


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


def describe_machine() -> dict[str, Any]:
    """Returns the date, the machine and the versions, without importing the packages."""
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    processor, memory = platform.machine(), 0
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.is_file() and meminfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
        memory = int(meminfo.read_text(encoding="ascii").split()[1]) * 1024
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB",
        "versions": versions,
    }
