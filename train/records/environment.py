"""Which code runs, on what: versions, git commit, command and host, for environment.json."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from blackpoint.data.files.paths import CODE_ROOT

PACKAGES = ("blackpoint", "torch", "lightning", "diffusers", "transformers", "webdataset", "wandb")
HERE = Path(__file__).resolve()
GIT_RECORD = "git.json"
"""Beside a frozen copy of the code, which may lie in a repository that has moved on."""


def describe_environment() -> dict[str, Any]:
    """Returns versions, git commit (None outside a repository), command and start time."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a distribution"
    program = sys.argv[0]
    is_ours = Path(program).stem in ("blackpoint", "cli", "verb_process")
    return {
        "command": shlex.join(["blackpoint" if is_ours else program, *sys.argv[1:]]),
        "started": now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "versions": versions,
        **git_state(),
    }


def git_state() -> dict[str, str | None]:
    """Returns the commit and the changed files of the code that runs; None outside a repository,
    and where it is merely installed inside somebody's."""
    frozen = CODE_ROOT / GIT_RECORD
    if frozen.exists():
        return json.loads(frozen.read_text(encoding="utf-8"))
    if _git("ls-files", "--error-unmatch", HERE.name) is None:
        return {"git_commit": None, "git_changes": None}
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
    }


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(HERE.parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
