"""Identity and names of the settings of a sweep.

A digest is of the settings that differ from the defaults and change a number; a name is for people:
the arm and what the grid varies.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blackpoint.data.files.dotted import flat
from blackpoint.sampling.evaluation.config import RESULT_INVARIANT_KEYS, metric_keys
from blackpoint.sampling.search.folder import RESULT_INVARIANT_KEYS as SEARCH_INVARIANT_KEYS
from blackpoint.scripts.config_fields import fields_of, item_hint, nested_class
from blackpoint.scripts.sweep.config import Settings

OWN_KEYS = {"train": "run_dir", "evaluate": "output", "search": "output"}
"""Keys that the sweep sets itself."""
INVARIANT_KEYS = {"evaluate": RESULT_INVARIANT_KEYS, "search": SEARCH_INVARIANT_KEYS}
"""Keys that change no number of a cell."""
IMAGE_INVARIANT_KEYS = INVARIANT_KEYS | {"evaluate": (*metric_keys(), *RESULT_INVARIANT_KEYS)}
"""Keys that change no image of a cell."""
UNNAMED_TRAINING_KEYS = (
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
"""Keys that a training's name does not tell. Others of train/records/resume_keys.py are told, as
they have been since the first sweep: a folder must keep its name."""
DIGEST_BYTES, MOST_LETTERS = 4, 80
"""Of a folder's name: of its digest, and letters of what stands before it."""
_NOTHING = object()


def differing(config: Any, invariant_keys: tuple[str, ...]) -> Settings:
    """Returns the flat settings that differ from the defaults, but for keys that change nothing."""
    settings = {}
    for key, value in flat(json.loads(json.dumps(asdict(config)))).items():
        if key in OWN_KEYS.values() or _is_of(key, invariant_keys):
            continue
        if value != _default(type(config), key):
            settings[key] = value
    return settings


def digest_of(content: object) -> str:
    """Returns a digest of eight letters."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def name_of(arm: str, varied: Mapping[str, Any], grid: Mapping[str, list[Any]]) -> str:
    """Names an arm with values of the grid; nothing for neither."""
    labels = [_label(key, value, varied, grid[key]) for key, value in varied.items()]
    return "_".join(filter(None, [arm, *labels]))


def folder_of(parent: Path, label: str, digest: str) -> Path:
    """Returns the folder of what has this digest, under whatever label it was begun."""
    there = sorted(parent.glob(f"*-{digest}")) if parent.is_dir() else []
    return there[0] if there else parent / f"{_slug(label)[:MOST_LETTERS]}-{digest}"


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


def _is_of(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix.rstrip('.')}.") for prefix in keys)


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
