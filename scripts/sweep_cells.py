"""The cells of a sweep: arms x grid, each with its settings, its training and a name that stays.

A cell is known by a digest of the settings that decide its images, those that differ from the
defaults, and of the contents of the prompts and weights that they name (scripts.content_digest):
adding values, arms or keys with their old values to a grid leaves the other cells what they were,
so only new ones are run. Its name is for people: the arm and what the grid varies.
"""

import difflib
import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files.errors import UserError
from sampling.dotted import flat
from sampling.evaluation import results
from sampling.evaluation.metrics import RESULT_INVARIANT_KEYS, metric_keys
from sampling.search.folder import FREE as FREE_OF_SEARCH
from scripts.config import load_values, read_yaml
from scripts.config_fields import fields_of, item_hint, nearest, nested_class
from scripts.content_digest import content_digests
from scripts.sweep_config import BASE, CLASSES, SECTIONS, Settings, SweepConfig

OWN_KEYS = {"train": "run_dir", "evaluate": "output", "search": "output"}
"""Keys that the sweep sets itself."""
FREE = {"evaluate": RESULT_INVARIANT_KEYS, "search": FREE_OF_SEARCH}
"""Keys that change no number of a cell."""
FREE_OF_IMAGES = FREE | {"evaluate": (*metric_keys(), *RESULT_INVARIANT_KEYS)}
"""Keys that change no image of a cell."""
FREE_OF_TRAINING = (
    "trainer.devices",
    "trainer.num_nodes",
    "data.num_workers",
    "trainer.keep_checkpoints",
    "trainer.keep_best",
    "data.cache_dir",
    "data.cache_gigabytes",
    "data.allow_shell_urls",
    "watch.",
    "wandb.",
)
"""Keys that a training's name does not tell. Others of train/resume_keys.py are told, as they have
been since the first sweep: a folder must keep its name."""
FORMER_DEFAULTS = {"data.resolution": 512}
"""Values that were once the default, and so left no mark in the name of a training."""
TRAININGS, CELLS = "trainings", "cells"
DIGEST_LETTERS, MOST_LETTERS = 8, 80
"""Of a folder's name: of its digest, and of what stands before it."""
_NOTHING = object()


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
    digest: str
    """Of all that decides the numbers, measures included."""


def cells_of(config: SweepConfig) -> list[Cell]:
    """Expands a sweep, whatever its `only`; raises UserError for what a verb would refuse."""
    shared = {section: _base(config, section) for section in SECTIONS}
    arms = {name: flat(arm or {}) for name, arm in config.arms.items()} or {"": {}}
    grid = flat(config.grid)
    for origin, keys in [*((f"arms.{n}", list(a)) for n, a in arms.items()), ("grid", list(grid))]:
        for key in keys:
            _check_key(key, origin)
    found: list[Cell] = []
    trainings: dict[str, Training] = {}
    for arm, own in arms.items():
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            found.append(_cell(config, shared, arm, own, varied, trainings))
    _check_distinct(found)
    _check_baseline(config.baseline, found)
    return found


def chosen_of(cells: list[Cell], only: list[str]) -> list[Cell]:
    """Returns the cells that one of the patterns names, all without any; UserError for none."""
    if not only:
        return cells
    chosen = [c for c in cells if any(fnmatch.fnmatch(c.name, each) for each in only)]
    if not chosen:
        near = difflib.get_close_matches(only[0], [c.name for c in cells], n=1, cutoff=0)
        raise UserError(f"only={only} names no cell; the nearest is {near[0]}")
    return chosen


def trainings_of(cells: list[Cell]) -> list[Training]:
    """Lists the trainings that cells need, each once."""
    found = {cell.training.folder: cell.training for cell in cells if cell.training is not None}
    return list(found.values())


def _base(config: SweepConfig, section: str) -> Settings:
    given = dict(getattr(config, section))
    path = given.pop(BASE, None)
    base = flat(read_yaml(path)) if path else {}
    base.pop(OWN_KEYS[section], None)  # what a run by itself is called
    return base | flat(given)


def _cell(
    config: SweepConfig,
    shared: dict[str, Settings],
    arm: str,
    own: Settings,
    varied: Settings,
    trainings: dict[str, Training],
) -> Cell:
    run_dir, grid = Path(config.run_dir), flat(config.grid)
    mine = {section: dict(shared[section]) for section in SECTIONS}
    for key, value in {**own, **varied}.items():
        section, _, rest = key.partition(".")
        mine[section] |= flat({rest: value})
    label = _name(arm, varied, grid) or "cell"
    for section, name in OWN_KEYS.items():
        if name in mine[section]:
            raise UserError(f"{section}.{name} is the sweep's own to set; leave it out")
    training = None
    if mine["train"]:
        of_training = {key: value for key, value in varied.items() if key.startswith("train.")}
        name = _name(arm, of_training, grid) or "training"
        training = _training(run_dir, mine["train"], name, label)
        training = trainings.setdefault(training.digest, training)
    sections = {}
    trained = training.digest if training else ""
    digests: list[Any] = [trained]
    identities: list[Any] = [trained]
    contents: dict[str, dict[str, str]] = {}
    for section in ("evaluate", "search"):
        settings = mine[section]
        if not settings:
            continue
        if training is not None:
            if "checkpoint" in settings:
                raise UserError(
                    f"{section}.checkpoint and train: a cell evaluates what it trains; leave one "
                    "of them out"
                )
            settings["checkpoint"] = str(training.folder)
        one = _checked(section, settings, label)
        trained_here = ("checkpoint",) if training is not None else ()
        digests.append(_differing(one, (*FREE[section], *trained_here)))
        identities.append(_differing(one, (*FREE_OF_IMAGES[section], *trained_here)))
        sections[section] = settings
        checkpoint = one.checkpoint if training is None else None
        if found := content_digests(one.prompts, checkpoint, one.weights):
            contents[section] = found
    if contents:
        digests.append(contents)
        identities.append(contents)
    if not sections and training is None:
        raise UserError(f"cell {label} has nothing to do: give train, evaluate or search keys")
    folder = _place(run_dir / CELLS, label, _digest(identities))
    return Cell(label, arm, varied, folder, training, sections, _digest(digests))


def _training(run_dir: Path, settings: Settings, name: str, label: str) -> Training:
    config = _checked("train", settings, label)
    told = _differing(config, FREE_OF_TRAINING)
    digest = _digest(told)
    folder = _place(run_dir / TRAININGS, name, digest)
    former = {key: value for key, value in told.items() if FORMER_DEFAULTS.get(key) == value}
    if former and not folder.exists():
        rest = {key: value for key, value in told.items() if key not in former}
        before = _place(run_dir / TRAININGS, name, _digest(rest))
        if _has_values(before / "config.yaml", former):
            digest, folder = _digest(rest), before
    return Training(folder.name, folder, settings, digest)


def _has_values(path: Path, values: Settings) -> bool:
    """Tells whether a run's config.yaml is there, and has these values."""
    if not path.is_file():
        return False
    there = flat(read_yaml(path))
    return all(there.get(key) == value for key, value in values.items())


def _checked(section: str, settings: Settings, label: str) -> Any:
    """Builds the verb's config, so that what it would refuse is refused before anything runs."""
    own = {OWN_KEYS[section]: "-"}
    try:
        return load_values(CLASSES[section], settings | own, f"{section} of the sweep")
    except UserError as error:
        raise UserError(f"cell {label}: {section}: {error}") from None


def _differing(config: Any, free: tuple[str, ...]) -> Settings:
    """Returns the flat settings that differ from the defaults, without those that are free."""
    found = {}
    for key, value in flat(json.loads(json.dumps(asdict(config)))).items():
        if key in OWN_KEYS.values() or _is_free(key, free):
            continue
        if value != _default(type(config), key):
            found[key] = value
    return found


def _default(config_class: type, key: str) -> object:
    """Returns the default of a dotted key, also inside an entry of a mapping of sections."""
    known = fields_of(config_class)
    if key in known:
        return known[key].default
    words = key.split(".")
    for length in range(1, len(words) - 1):
        parent = known.get(".".join(words[:length]))
        section = nested_class(item_hint(parent.hint)) if parent else None
        rest = ".".join(words[length + 1 :])
        if section is not None and rest in fields_of(section):
            return fields_of(section)[rest].default
    return _NOTHING


def _place(parent: Path, label: str, digest: str) -> Path:
    """Returns the folder of what has this digest, under whatever label it was begun."""
    there = sorted(parent.glob(f"*-{digest}")) if parent.is_dir() else []
    return there[0] if there else parent / f"{_slug(label)[:MOST_LETTERS]}-{digest}"


def _check_key(key: str, origin: str) -> None:
    section, _, rest = key.partition(".")
    if section in CLASSES and rest:
        return  # the verb's own check names the nearest
    known = [
        f"{n}.{path}" for n in ("evaluate", "search", "train") for path in fields_of(CLASSES[n])
    ]
    closest = nearest(key, known)
    remedy = f"did you mean {closest}?" if closest else "evaluate.num_steps is one."
    raise UserError(
        f"{origin}: {key} is not a key of train, evaluate or search; {remedy} Keys begin with the "
        "verb, train., evaluate. or search."
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


def _name(arm: str, varied: Mapping[str, Any], grid: Mapping[str, list[Any]]) -> str:
    """Names an arm with values of the grid; nothing for neither."""
    labels = [_label(key, value, varied, grid[key]) for key, value in varied.items()]
    return "_".join(filter(None, [arm, *labels]))


def _label(key: str, value: Any, varied: Mapping[str, Any], values: list[Any]) -> str:
    """Names one value of the grid, by the last word of its key where that is not ambiguous; a path
    by its last part, likewise."""
    last = key.rpartition(".")[2]
    if sum(each.rpartition(".")[2] == last for each in varied) > 1:
        last = key.replace(".", "-")
    text = _last_part(value)
    if any(_last_part(other) == text and other != value for other in values):
        text = _slug(_text(value))
    return f"{last}-{text or 'empty'}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _last_part(value: Any) -> str:
    text = _text(value)
    return _slug(Path(text).name if "/" in text else text)


def _slug(text: str) -> str:
    """Writes a text as it can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")


def _is_free(key: str, free: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each.rstrip('.')}.") for each in free)


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_LETTERS // 2).hexdigest()
