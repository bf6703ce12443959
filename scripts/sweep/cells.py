"""The cells of a sweep: arms x grid, each with its settings, its training and a name that stays.

A cell is known by a digest of the settings that decide its images, those that differ from the
defaults, and of the contents of the prompts and weights that they name
(blackpoint.scripts.sweep.content_digest): adding values, arms or keys with their old values to a
grid leaves the other cells what they were, so only new ones are run. Its name is for people: the
arm and what the grid varies.
"""

import difflib
import fnmatch
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report import results
from blackpoint.scripts.config import load_values, read_yaml
from blackpoint.scripts.config_fields import fields_of, nearest
from blackpoint.scripts.sweep.config import BASE, CLASSES, SECTIONS, Settings, SweepConfig
from blackpoint.scripts.sweep.content_digest import content_digests
from blackpoint.scripts.sweep.identity import (
    IMAGE_INVARIANT_KEYS,
    INVARIANT_KEYS,
    OWN_KEYS,
    UNNAMED_TRAINING_KEYS,
    differing,
    digest_of,
    folder_of,
    name_of,
)

FORMER_DEFAULTS = {"data.resolution": 512}
"""Values that were once the default, and so left no mark in the name of a training."""
TRAININGS, CELLS = "trainings", "cells"


@dataclass(frozen=True)
class Training:
    """A training that one or more cells need."""

    name: str
    folder: Path
    settings: Settings
    digest: str


@dataclass(frozen=True)
class Cell:
    """One setting of everything."""

    name: str
    arm: str
    varied: dict[str, Any]
    """Grid key -> this cell's value."""
    folder: Path
    training: Training | None
    sections: dict[str, Settings]
    """evaluate and search: keys and values of the verb, without its output."""
    configs: dict[str, Any] = field(repr=False, compare=False)
    """The same as the verbs' configs."""
    digest: str
    """Of all that decides the numbers, measures included."""


def cells_of(config: SweepConfig) -> list[Cell]:
    """Expands a sweep, whatever its `only`; raises UserError for what a verb would refuse."""
    if Path(config.run_dir).is_file():
        raise UserError(f"run_dir={config.run_dir}: is a file; name a folder")
    shared = {section: _base(config, section) for section in SECTIONS}
    arms = {name: flat(arm or {}) for name, arm in config.arms.items()} or {"": {}}
    grid = flat(config.grid)
    for origin, keys in [*((f"arms.{n}", list(a)) for n, a in arms.items()), ("grid", list(grid))]:
        for key in keys:
            _check_key(key, origin)
    expansion = _Expansion(Path(config.run_dir), shared, grid)
    cells = [
        expansion.cell(arm, settings, dict(zip(grid, values, strict=True)))
        for arm, settings in arms.items()
        for values in itertools.product(*grid.values())
    ]
    _check_distinct(cells)
    _check_baseline(config.baseline, cells)
    return cells


def chosen_of(cells: list[Cell], only: list[str]) -> list[Cell]:
    """Returns the cells that one of the patterns names, all without any; UserError for none."""
    if not only:
        return cells
    chosen = [c for c in cells if any(fnmatch.fnmatch(c.name, pattern) for pattern in only)]
    if not chosen:
        near = difflib.get_close_matches(only[0], [c.name for c in cells], n=1, cutoff=0)
        raise UserError(f"only={only} names no cell; the nearest is {near[0]}")
    return chosen


def trainings_of(cells: list[Cell]) -> list[Training]:
    """Lists the trainings that cells need, each once."""
    trainings = {cell.training.folder: cell.training for cell in cells if cell.training is not None}
    return list(trainings.values())


def _base(config: SweepConfig, section: str) -> Settings:
    given = dict(getattr(config, section))
    path = given.pop(BASE, None)
    base = flat(read_yaml(path)) if path else {}
    base.pop(OWN_KEYS[section], None)  # what a run by itself is called
    return base | flat(given)


@dataclass
class _Expansion:
    """A sweep while its cells are made."""

    run_dir: Path
    shared: dict[str, Settings]
    """By section."""
    grid: Settings
    trainings: dict[str, Training] = field(default_factory=dict)
    """By digest."""

    def cell(self, arm: str, settings: Settings, varied: Settings) -> Cell:
        """Makes the cell of an arm with its settings, and of values of the grid."""
        label = name_of(arm, varied, self.grid) or "cell"
        by_section = self._by_section(settings | varied)
        train = by_section.pop("train")
        training = self._training(train, arm, varied, label) if train else None
        sections = {section: settings for section, settings in by_section.items() if settings}
        if not sections and training is None:
            raise UserError(f"cell {label} has nothing to do: give train, evaluate or search keys")
        for section, keys in sections.items():
            if training is None:
                continue
            if "checkpoint" in keys:
                raise UserError(
                    f"{section}.checkpoint and train: a cell evaluates what it trains; leave one "
                    "of them out"
                )
            keys["checkpoint"] = str(training.folder)
        configs = {section: _checked(section, keys, label) for section, keys in sections.items()}
        images, numbers = _digests(configs, training)
        folder = folder_of(self.run_dir / CELLS, label, images)
        return Cell(label, arm, varied, folder, training, sections, configs, numbers)

    def _by_section(self, settings: Settings) -> dict[str, Settings]:
        """Returns what all cells share, with these dotted settings, by section."""
        by_section = {section: dict(self.shared[section]) for section in SECTIONS}
        for key, value in settings.items():
            section, _, rest = key.partition(".")
            by_section[section] |= flat({rest: value})
        for section, name in OWN_KEYS.items():
            if name in by_section[section]:
                raise UserError(f"{section}.{name} is the sweep's own to set; leave it out")
        return by_section

    def _training(self, settings: Settings, arm: str, varied: Settings, label: str) -> Training:
        """Makes a training, or returns the one that an earlier cell has with these settings."""
        of_training = {key: value for key, value in varied.items() if key.startswith("train.")}
        name = name_of(arm, of_training, self.grid) or "training"
        told = differing(_checked("train", settings, label), UNNAMED_TRAINING_KEYS)
        digest, parent = digest_of(told), self.run_dir / TRAININGS
        folder = folder_of(parent, name, digest)
        former = {key: value for key, value in told.items() if FORMER_DEFAULTS.get(key) == value}
        if former and not folder.exists():
            rest = digest_of({key: value for key, value in told.items() if key not in former})
            before = folder_of(parent, name, rest)
            if _has_values(before / "config.yaml", former):
                digest, folder = rest, before
        return self.trainings.setdefault(digest, Training(folder.name, folder, settings, digest))


def _digests(configs: dict[str, Any], training: Training | None) -> tuple[str, str]:
    """Returns the digests of what decides a cell's images, and of what decides its numbers."""
    images: list[Any] = [training.digest if training else ""]
    numbers = list(images)
    contents: dict[str, dict[str, str]] = {}
    trained_here = ("checkpoint",) if training else ()
    for section, config in configs.items():
        images.append(differing(config, (*IMAGE_INVARIANT_KEYS[section], *trained_here)))
        numbers.append(differing(config, (*INVARIANT_KEYS[section], *trained_here)))
        checkpoint = None if training else config.checkpoint
        if digests := content_digests(config.prompts, checkpoint, config.weights, config.lora):
            contents[section] = digests
    rest = [contents] if contents else []
    return digest_of(images + rest), digest_of(numbers + rest)


def _has_values(path: Path, values: Settings) -> bool:
    """Tells whether a run's config.yaml is there, and has these values."""
    if not path.is_file():
        return False
    there = flat(read_yaml(path))
    return all(there.get(key) == value for key, value in values.items())


def _checked(section: str, settings: Settings, label: str) -> Any:
    """Builds the verb's config, so that what it would refuse is refused before anything runs."""
    unset = {OWN_KEYS[section]: "-"}
    try:
        return load_values(CLASSES[section], settings | unset, f"{section} of the sweep")
    except UserError as error:
        raise UserError(f"cell {label}: {section}: {error}") from None


def _check_key(key: str, origin: str) -> None:
    section, _, rest = key.partition(".")
    if section in CLASSES and rest:
        return  # the verb's own check names the nearest
    known = [
        f"{n}.{path}" for n in ("evaluate", "search", "train") for path in fields_of(CLASSES[n])
    ]
    closest = nearest(key, known)
    remedy = f"did you mean {closest}?" if closest else "evaluate.num_steps is one"
    raise UserError(
        f"{origin}: {key} is not a key of train, evaluate or search; {remedy} Keys begin with the "
        "verb, train., evaluate. or search"
    )


def _check_distinct(cells: list[Cell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        identity = cell.folder.name.rpartition("-")[2]
        if identity in seen:
            raise UserError(
                f"cells {seen[identity]} and {cell.name} are the same: what they differ in "
                "changes no image; drop one"
            )
        seen[identity] = cell.name
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} cells are called {name}; make arms of their settings, whose "
                "names you choose: arms.NAME"
            )


def _check_baseline(baseline: str | None, cells: list[Cell]) -> None:
    """Raises UserError where a report would not find the baseline."""
    if baseline is None:
        return
    known = {name for cell in cells for name in (cell.arm, cell.name) if name}
    known |= {results.Cell(cell.name, cell.arm, cell.varied).setting for cell in cells}
    if baseline not in known:
        near = difflib.get_close_matches(baseline, sorted(known), n=1, cutoff=0)
        raise UserError(
            f"baseline={baseline} is no arm, cell or setting of the sweep; the nearest is {near[0]}"
        )
