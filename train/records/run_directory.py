"""The run directory: records of earlier starts, and those that a start adds.

config.yaml (resolved), environment.json, identity.json, checkpoints/, metrics.csv, previews/,
wandb/ and, once the run is finished, export/. The record is read once per start; whether a command
may continue the run is in train/records/continuing.py.
"""

import functools
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.paths import is_remote
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import read_yaml, read_yaml_file, to_yaml
from blackpoint.data.images.decode import STORED_COLORS
from blackpoint.data.images.picture_size import READER_VERSION
from blackpoint.sampling.choices import recorded_formats
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.environment import describe_environment, now
from blackpoint.train.records.resume_keys import When, may_change, rule_of

CONFIG, ENVIRONMENT, IDENTITY = "config.yaml", "environment.json", "identity.json"
FORMATS = ("encoder_dtype", "tf32")
"""Keys of `trainer` whose `auto` is settled on the device (sampling/runtime/precision.py)."""
ABSENT = "(not set)"
CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")


@dataclass(frozen=True)
class RunRecord:
    """Records of earlier starts in a run directory; empty for a new run."""

    run_dir: Path
    is_new: bool = True
    tree: Mapping[str, Any] = field(default_factory=dict)
    """config.yaml as it is written."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Sections `data` and `base`; {} for a run from before there was a record."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    newest_step: int = 0
    is_exported: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Reads the records; files that a power failure has emptied count as missing."""
        newest, is_exported = newest_step(run_dir), (run_dir / "export").exists()
        path = run_dir / CONFIG
        if not (tree := read_yaml_file(path) if path.exists() else None):
            return cls(run_dir, newest_step=newest, is_exported=is_exported)
        identity, environment = read_identity(run_dir), _read_json(run_dir / ENVIRONMENT)
        return cls(run_dir, False, tree, identity, environment, newest, is_exported)

    @functools.cached_property
    def written(self) -> dict[str, Any]:
        """Values of config.yaml by dotted keys."""
        return flat(self.tree)

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The config by dotted keys; a key that came after the run began had its default then."""
        defaults: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
        return flat(defaults) | self.written

    @property
    def steps_done(self) -> int:
        """How many steps the run has saved or, where its checkpoints were removed, exported."""
        if not self.is_exported or self.is_new:
            return self.newest_step
        return self.newest_step or self.values["trainer.max_steps"]

    def is_finished(self, max_steps: int) -> bool:
        """Tells whether the run was exported, after no less than `max_steps`."""
        return self.is_exported and self.steps_done >= max_steps

    def began_before(self, key: str) -> bool:
        """Tells whether the run's config was written before `key` existed."""
        return not self.is_new and key not in self.written

    @property
    def formats(self) -> tuple[dict[str, Any] | None, bool]:
        """The number formats that the run began in, None for a new one, and whether it recorded
        what `auto` took."""
        if self.is_new:
            return None, False
        return recorded_formats(self.written, FORMATS, "trainer.")

    @property
    def decoder(self) -> int:
        """The version of the decoder of images that the run began with; today's for a new run."""
        if self.is_new:
            return READER_VERSION
        data_sets = self.identity.get("data", {}).values()
        recorded = data_sets or self.environment.get("starts", [])[:1]
        return min((of.get("decoder", STORED_COLORS) for of in recorded), default=STORED_COLORS)

    def compared(self, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the dotted keys of the run and of `config`, whose `auto` is of no device yet."""
        old, new = dict(self.values), flat(read_yaml(to_yaml(config)))
        for name, value in (self.formats[0] or {}).items():
            key = f"trainer.{name}"
            old[key] = value
            new[key] = value if new[key] == "auto" else new[key]
        return old, new

    def renames(self, config: TrainConfig, kind: When) -> bool:
        """Tells whether `config` names the run's data, or its base, otherwise than it began."""
        if self.is_new:
            return False
        old, new = self.compared(config)
        return any(may_change(key, kind) for key in differing_keys(old, new))

    def changed_keys(self, config: TrainConfig) -> dict[str, list[Any]]:
        """Returns [value there, value now] of the keys that a start changes, by key."""
        if self.is_new:
            return {}
        old, new = self.compared(config)
        return {
            key: [old.get(key), new.get(key)]
            for key in sorted(old.keys() | new.keys())
            if rule_of(key) and old.get(key) != new.get(key)
        }


def newest_step(run_dir: Path) -> int:
    """Returns the step of the newest checkpoint, 0 without one."""
    names = (CHECKPOINT.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("*.ckpt"))
    return max((int(name[1]) for name in names if name), default=0)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values differ; two paths to one place are the same value."""

    def is_same(key: str) -> bool:
        then, here = old.get(key, ABSENT), new.get(key, ABSENT)
        if then == here or (key == "data.resolution" and not here):  # it goes on with what it has
            return True
        is_path = may_change(key, When.SAME_DATA) or may_change(key, When.SAME_BASE)
        return is_path and _is_same_place(then, here)

    return [key for key in sorted(old.keys() | new.keys()) if not is_same(key)]


def describe_batch(config: TrainConfig) -> dict[str, int]:
    """Returns how many images a step takes, and how they are divided."""
    num_processes = config.trainer.devices * config.trainer.num_nodes
    accumulated = config.trainer.accumulate_grad_batches
    return {
        "images_per_step": config.batch_size * accumulated,
        "num_processes": num_processes,
        "images_per_process": config.batch_size // num_processes,
        "accumulate_grad_batches": accumulated,
    }


def write_records(
    record: RunRecord, config: TrainConfig, resume_step: int = 0, device: str = "cpu"
) -> None:
    """Writes config.yaml and environment.json; a start that continues adds itself to the latter,
    with the keys that it changes, whose values config.yaml takes over.

    The number formats of the config are settled, on a `device` of that kind.
    """
    record.run_dir.mkdir(parents=True, exist_ok=True)
    start = {"started": now(), "host": platform.node(), "step": resume_step}
    start["decoder"] = record.decoder
    if changed := record.changed_keys(config):
        start["changed"] = changed
    start |= describe_batch(config) | {"device": device}
    start |= {name: getattr(config.trainer, name) for name in FORMATS}
    environment = dict(record.environment or describe_environment())
    environment["starts"] = [*environment.get("starts", []), start]
    write_whole(record.run_dir / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
    write_config(record, config)  # last: it is what makes the directory a run


def write_config(record: RunRecord, config: TrainConfig) -> None:
    """Writes config.yaml; one that is there takes over the values that may change."""
    path = record.run_dir / CONFIG
    if record.is_new:
        write_whole(path, to_yaml(config))
    elif changed := record.changed_keys(config):
        tree = _updated(record.tree, read_yaml(to_yaml(config)), changed)
        write_whole(path, to_yaml(tree))


def read_identity(run_dir: Path) -> dict[str, Any]:
    """Returns the sections of identity.json; {} where there is none."""
    return _read_json(run_dir / IDENTITY)


def write_identity(run_dir: Path, **sections: Mapping[str, Any]) -> None:
    """Records sections, and leaves others as they are."""
    before = read_identity(run_dir)
    if before | sections != before:
        text = json.dumps(before | sections, separators=(",", ":"))
        write_whole(run_dir / IDENTITY, text + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # removed, or emptied by a power failure
        return {}
    return content if isinstance(content, dict) else {}


def _updated(
    saved: Mapping[str, Any], new: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Returns `saved` with the values of `new` at the dotted `keys`; others stay as they are."""
    tree = dict(saved)
    for name, value in new.items():
        key = f"{prefix}{name}"
        if key in keys:
            tree[name] = value
        elif isinstance(value, dict):
            section = _updated(saved.get(name) or {}, value, keys, f"{key}.")
            tree |= {name: section} if section else {}
    return tree


def _is_same_place(one: Any, other: Any) -> bool:
    return (
        isinstance(one, str)
        and isinstance(other, str)
        and not (is_remote(one) or is_remote(other))
        and os.path.realpath(one) == os.path.realpath(other)
    )
