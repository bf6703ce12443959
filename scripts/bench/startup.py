"""Start-up in the benchmark: whole processes, from nothing to the answer.

`blackpoint --help`, and of every verb --help and --print-config; the bare interpreter and `import
torch` stand beside them. All take turns, round after round.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from blackpoint.data.files.errors import RunFailed
from blackpoint.scripts.bench.timing import Row, Seconds, row, time_round
from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config_fields import container_of, fields_of
from blackpoint.scripts.verb_process import verb_command

GROUP = "start-up, whole process"
PYTHON, TORCH, HELP = "python -c pass", "python -c 'import torch'", "blackpoint --help"
LONGEST_HELP_S = 1.0
# Verbs that need one of several keys, so that none of them is required by itself.
ALSO_NEEDED = {
    "train": ["checkpoint=x"],
    "search": ["verifiers.x.kind=luminance"],
    "sweep": ["evaluate.checkpoint=x"],
}


def commands(verbs: list[str]) -> dict[str, list[str]]:
    """Returns what is started, by name."""
    command = verb_command()
    started = {
        PYTHON: [sys.executable, "-c", "pass"],
        TORCH: [sys.executable, "-c", "import torch"],
        HELP: [*command, "--help"],
    }
    for verb in verbs:
        started[f"blackpoint {verb} --help"] = [*command, *verb.split(), "--help"]
        arguments = [*verb.split(), *required_keys(verb), "--print-config"]
        started[f"blackpoint {verb} --print-config"] = [*command, *arguments]
    return started


def required_keys(verb: str) -> list[str]:
    """Returns a key=value for every key that the verb's config requires."""
    config_class: type[Any] = importlib.import_module(VERBS[verb][0]).config_class()
    values = {int: "1"}
    required = [
        f"{field.path}={{name: x}}"
        if container_of(field.hint)
        else f"{field.path}={values.get(field.hint, 'x')}"
        for field in fields_of(config_class).values()
        if field.default == "???"
    ]
    return [*required, *ALSO_NEEDED.get(verb, [])]


def time_startup(verbs: list[str], rounds: int) -> Seconds:
    """Returns the seconds of each command, one per round, after one that is not timed."""
    parts: dict[str, Callable[[], object]] = {
        name: partial(_start, command) for name, command in commands(verbs).items()
    }
    seconds: Seconds = {}
    time_round(parts, 0, {})
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


def startup_rows(seconds: Seconds) -> list[Row]:
    """Returns the seconds of all commands; every help is wanted within a second."""
    return [
        row(GROUP, name, "s", values, at_most=LONGEST_HELP_S if "--help" in name else None)
        for name, values in seconds.items()
    ]


def _start(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RunFailed(f"{' '.join(command)} exited {result.returncode}:\n{result.stderr}")
