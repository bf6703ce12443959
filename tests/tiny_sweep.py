"""Sweeps of evaluations that are over in seconds, or that nothing is run of."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from blackpoint.scripts.config import load
from blackpoint.scripts.sweep.cells import Cell, cells_of
from blackpoint.scripts.sweep.config import SweepConfig

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
