"""Exports that a run writes on its way (train/callbacks/exports.py), as its config says them."""

from dataclasses import dataclass
from typing import Literal

from blackpoint.data.files.rules import check_ranges

ExportFormat = Literal["folder", "file", "lora"]


@dataclass
class StepExportConfig:
    """Exports of the averaged weights to run_dir/exports while the run goes on."""

    every_steps: int = 0
    """Optimizer steps between exports, each of which has a checkpoint too; 0 switches them off. The
    end of the run is exported in any case, to run_dir/export."""
    format: ExportFormat = "folder"
    """A diffusers folder, a single .safetensors file in float16, or the files of the adapters."""
    keep: int = 3
    """Number of newest exports to keep."""

    def __post_init__(self) -> None:
        check_ranges(self, "export.", every_steps=">= 0", keep=">= 1")
