"""Sweeps of evaluations that are over in seconds, or that nothing is run of."""

import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blackpoint.scripts.config import load
from blackpoint.scripts.sweep import runner
from blackpoint.scripts.sweep.cells import Cell, cells_of
from blackpoint.scripts.sweep.config import SweepConfig
from tests.warm_verb import WarmVerb

EVALUATE = {
    "prompts": ["a cat on a black background", "a street"],
    "num_steps": 2,
    "guidance_scale": 1.0,
    "brightness.invariance_prompts": 0,
    "batch_size": 2,
}


def sweep(folder: Path, **settings: Any) -> Path:
    """Writes a sweep of evaluations; returns its YAML file."""
    content = {"run_dir": str(folder / "sweep"), "evaluate": EVALUATE} | settings
    path = folder / "sweep.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return path


def cells(folder: Path, **settings: Any) -> list[Cell]:
    """Expands a sweep."""
    return cells_of(load(SweepConfig, [str(sweep(folder, **settings))]))


def start_cells_warm(patch: pytest.MonkeyPatch) -> None:
    """Starts the verbs of this process's sweeps in processes that have everything imported."""

    def start(command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> WarmVerb:
        return WarmVerb(*command[2:], environment=env, log=stdout.name)

    stand_in = types.SimpleNamespace(**{**vars(subprocess), "Popen": start})
    patch.setattr(runner, "subprocess", stand_in)
    patch.setattr(runner, "POLL_S", 0.05)
