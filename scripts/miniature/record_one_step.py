"""Records the step that `blackpoint doctor` repeats: python -m
blackpoint.scripts.miniature.record_one_step [key=value ...], in float64 on the CPU."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from blackpoint.data.files.whole_file import write_whole
from blackpoint.scripts.config import load
from blackpoint.scripts.doctor.one_step import one_step
from blackpoint.scripts.stand_alone import describe_machine, run_script


@dataclass
class RecordConfig:
    """Where the record goes."""

    output: str = "assets/one_step.json"
    """The file."""


def record(config: RecordConfig) -> None:
    """Computes and writes the record."""
    content = one_step(torch.device("cpu"), torch.float64) | {"made": describe_machine()}
    write_whole(Path(config.output), json.dumps(content, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("record_one_step", lambda: record(load(RecordConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
