"""The configuration of `blackpoint sweep`; free of torch, so that its help is instant."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.evaluation.config import MetricsConfig
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.train.config.config import TrainConfig

CLASSES: dict[str, type] = {"train": TrainConfig, "evaluate": MetricsConfig, "search": SearchConfig}
SECTIONS = tuple(CLASSES)
BASE = "config"
"""Key of a section that names a YAML file of its verb, under the section's other keys."""

Settings = dict[str, Any]


@dataclass
class SweepConfig:
    """A grid of settings, each cell of which is trained, evaluated or searched."""

    run_dir: OutputText = MISSING
    """Folder of the sweep: trainings/, cells/, sweep.json; the same command there goes on."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of `blackpoint train` that all cells share; cells with the same ones share a training.
    `config: FILE` takes a YAML file first. Empty: nothing is trained."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Keys of `blackpoint evaluate` that all cells share, in the same way."""
    search: dict[str, Any] = field(default_factory=dict)
    """Keys of `blackpoint search` that all cells share, in the same way."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Name -> keys such as evaluate.guidance_scale with one value each, for settings that go
    together."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Key such as evaluate.num_steps -> list of values; every arm is crossed with all of them."""
    baseline: str | None = None
    """Arm, cell, or setting as the report names it, that the report compares the others with; the
    first if not set."""
    only: list[str] = field(default_factory=list)
    """Names of cells, with * for any letters; the others are left alone."""
    plan: bool = False
    """Print the cells, and which of them are done; run nothing."""
    num_processes: int = 1
    """Cells that are run at once here; they share the processor cores. In a SLURM array each
    element takes its own cells."""

    @classmethod
    def entry_hint(cls, path: str) -> Any:
        """Returns the type of an entry such as evaluate.prompts, arms.NAME.train.seed or
        grid.evaluate.num_steps (a list of what that key holds); None for no key of a verb."""
        from blackpoint.scripts.config_fields import hint_at

        first, _, rest = path.partition(".")
        if first in ("arms", "grid"):
            section, _, key = (rest.partition(".")[2] if first == "arms" else rest).partition(".")
        else:
            section, key = first, rest
        if section not in SECTIONS:
            return None
        hint = PathText if key == BASE else hint_at(CLASSES[section], key)
        return list[hint] if first == "grid" else hint  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise UserError(f"num_processes={self.num_processes} must be at least 1")
        if not any(getattr(self, section) for section in SECTIONS) and not self.arms:
            raise UserError(
                "nothing to do: give the keys of train, evaluate or search, such as "
                "evaluate.checkpoint=FOLDER evaluate.prompts=FILE"
            )
        for name, arm in self.arms.items():
            if not isinstance(arm, dict | None):
                raise UserError(
                    f"arms.{name}={arm!r} must be a mapping of keys to values, such as "
                    "{evaluate.guidance_scale: 3.0}"
                )
        for key, values in flat(self.grid).items():
            if not isinstance(values, list) or not values:
                raise UserError(f"grid.{key}={values!r} must be a list of one value or more")
