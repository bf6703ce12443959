"""Exports that a run writes on its way (train/callbacks/exports.py), as its config says them."""

from dataclasses import dataclass

from blackpoint.data.files.rules import check_ranges


@dataclass
class StepExportConfig:
    """Diffusers folders of the averaged weights, in run_dir/exports, while the run goes on."""

    every_steps: int = 0
    """Optimizer steps between exports, each of which has a checkpoint too; 0 switches them off. The
    end of the run is exported in any case, to run_dir/export."""
    keep: int = 3
    """Number of newest exports to keep."""

    def __post_init__(self) -> None:
        check_ranges(self, "export.", every_steps=">= 0", keep=">= 1")
