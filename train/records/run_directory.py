"""The run directory: what it holds, and whether a command may continue what is there.

config.yaml (resolved), environment.json, identity.json, checkpoints/, metrics.csv, previews/,
wandb/ and, once the run is finished, export/.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from blackpoint.data.files.dotted import flat, value_at
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import is_remote
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import read_yaml, read_yaml_file, to_yaml
from blackpoint.sampling.choices import recorded_formats
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.resume_keys import When, images_per_step, may_change, rule_of
from blackpoint.train.records.run_identity import begun_decoder, read_identity

PACKAGES = ("blackpoint", "torch", "lightning", "diffusers", "transformers", "webdataset", "wandb")
FORMATS = ("encoder_dtype", "tf32")
"""Keys of `trainer` whose `auto` is settled on the device (sampling/runtime/precision.py)."""
SECTIONS = {When.SAME_DATA: "data", When.SAME_BASE: "base"}
"""Of identity.json: what tells data and base from others."""
ABSENT = "(not set)"
# A run that is older than this key keeps the rule of its time: max(w, floor) at every timestep.
FLOOR_KEY = "loss.floor_where"
UNKNOWN_CONTENT = {
    "data": "its data hold: continue it once with the data where they were, and it knows them",
    "base": "its base holds: continue it once with the base where it was, and it knows it",
}
CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")
# Beside a frozen copy of the code, which may lie in a repository that has moved on.
GIT_RECORD = "git.json"
# What a run writes; other files, such as shards, may lie in its directory from the start.
WRITTEN = ("checkpoints", "metrics.csv", "previews", "export")


def check_continues(run_dir: Path, config: TrainConfig) -> None:
    """Raises UserError where `run_dir` holds a run of another config, or parts of a run."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is a file; name a directory")
    saved = run_dir / "config.yaml"
    if not saved.exists():
        taken = [name for name in WRITTEN if (run_dir / name).exists()]
        if taken:
            raise UserError(
                f"run_dir={run_dir} holds {taken[0]} but no run (config.yaml is missing); nothing "
                "is overwritten: choose another run_dir"
            )
        return
    old, new = _saved_and_new(run_dir, config)
    differing = [key for key in sorted(old.keys() | new.keys()) if not _same(key, old, new)]
    if FLOOR_KEY in differing and is_older_than(run_dir, FLOOR_KEY):
        differing.remove(FLOOR_KEY)
    refused, unknown = [], set[str]()
    for key in differing:
        rule = rule_of(key)
        match rule and rule.when:
            case When.ALWAYS | When.SAME_RATE:
                continue
            case When.SAME_STEP:
                is_refused = new["data.buckets.enabled"] or (
                    images_per_step(old) != images_per_step(new)
                )
            case When.SAME_DATA | When.SAME_BASE as kind:
                is_refused = SECTIONS[kind] not in read_identity(run_dir)
                unknown |= {SECTIONS[kind]} if is_refused else set()
            case _:
                is_refused = True
        if is_refused:
            refused.append(key)
    if refused:
        rows = [f"  {k}: {old.get(k, ABSENT)} there, {new.get(k, ABSENT)} now" for k in refused]
        raise UserError(
            f"run_dir={run_dir} holds a run of another config:\n"
            + "\n".join(rows)
            + "\nchoose another run_dir, or continue that run with its own values"
            + "".join(
                f"; this run did not record what {UNKNOWN_CONTENT[name]} anywhere"
                for name in sorted(unknown)
            )
        )
    _check_length(run_dir, config, old["trainer.max_steps"])


def names_other(run_dir: Path, config: TrainConfig, kind: When) -> bool:
    """Tells whether a run's data, or its base, are now named otherwise than when it began."""
    if not (run_dir / "config.yaml").exists():
        return False
    old, new = _saved_and_new(run_dir, config)
    keys = old.keys() | new.keys()
    return any(may_change(key, kind) and not _same(key, old, new) for key in keys)


def newest_step(run_dir: Path) -> int:
    """Returns the step of the newest checkpoint, 0 without one."""
    names = (CHECKPOINT.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("*.ckpt"))
    return max((int(name[1]) for name in names if name), default=0)


def steps_done(run_dir: Path) -> int:
    """Returns how many steps a run has saved or, where its checkpoints were removed, exported."""
    if not (run_dir / "export").exists() or not (run_dir / "config.yaml").exists():
        return newest_step(run_dir)
    return newest_step(run_dir) or value_at(
        read_yaml_file(run_dir / "config.yaml"), "trainer.max_steps"
    )


def as_started(run_dir: Path, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Returns the config that a run goes on with, and notes on what differs from a new run's.

    That is `config` itself but for a run that is older than loss.floor_where and whose weights that
    key would change: its floor holds at every timestep, as it did when the run was started.
    """
    if not is_older_than(run_dir, FLOOR_KEY):
        return config, []
    notes = []
    kind = config.loss.prediction_type
    validates = config.trainer.validate_every_steps and config.data.validation_shards
    if validates and kind != "v_prediction":
        notes.append(
            f"validation/loss is the error in v from here on; that of the network's own output, "
            f"which earlier rows and best.json hold, goes on as validation/{kind}_loss"
        )
    if config.loss.weighting != "uniform" and config.loss.floor_where != "everywhere":
        notes.append(
            f"{run_dir} was started with loss.floor at every timestep, and goes on with the same "
            "weights (loss.floor_where=everywhere); a new run lifts those of SNR below 1 alone"
        )
        loss = dataclasses.replace(config.loss, floor_where="everywhere")
        config = dataclasses.replace(config, loss=loss)
    return config, notes


def is_older_than(run_dir: Path, key: str) -> bool:
    """Tells whether `run_dir` holds a run whose config was written before `key` existed."""
    saved = run_dir / "config.yaml"
    return saved.exists() and key not in flat(read_yaml_file(saved))


def kept_formats(run_dir: Path) -> tuple[dict[str, Any] | None, bool]:
    """Returns the number formats that a run began in, None for a new one, and whether it recorded
    what `auto` took."""
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return None, False
    return recorded_formats(flat(read_yaml_file(saved)), FORMATS, "trainer.")


def write_records(
    run_dir: Path, config: TrainConfig, resume_step: int = 0, device: str = "cpu"
) -> None:
    """Writes config.yaml and environment.json; a start that continues adds itself to the latter,
    with the keys that it changes, whose values config.yaml takes over.

    The number formats of the config are settled, on a `device` of that kind.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    continues = (run_dir / "config.yaml").exists()
    path = run_dir / "environment.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if continues else {}
    except (FileNotFoundError, ValueError):  # removed, or emptied by a power failure
        record = {}
    start = {"started": _now(), "host": platform.node(), "step": resume_step}
    start["decoder"] = begun_decoder(run_dir)
    formats = {"device": device, **{name: getattr(config.trainer, name) for name in FORMATS}}
    changed = changed_keys(run_dir, config) if continues else {}
    start |= {"changed": changed} if changed else {}
    starts = [*record.get("starts", []), start | describe_batch(config) | formats]
    environment = (record or describe_environment()) | {"starts": starts}
    write_whole(path, json.dumps(environment, indent=2) + "\n")
    write_config(run_dir, config)  # last: it is what makes the directory a run


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes config.yaml; one that is there takes over the values that may change."""
    path = run_dir / "config.yaml"
    if not path.exists():
        write_whole(path, to_yaml(config))
    elif changed := changed_keys(run_dir, config):
        tree = _updated(read_yaml_file(path), read_yaml(to_yaml(config)), changed)
        write_whole(path, to_yaml(tree))


def changed_keys(run_dir: Path, config: TrainConfig) -> dict[str, list[Any]]:
    """Returns [value there, value now] of the keys that a start changes, by key."""
    old, new = _saved_and_new(run_dir, config)
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if rule_of(key) and old.get(key) != new.get(key)
    }


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


def describe_environment() -> dict[str, Any]:
    """Returns versions, git commit (None outside a repository), command and start time."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a distribution"
    return {
        "command": shlex.join(sys.argv),
        "started": _now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "versions": versions,
        **git_state(),
    }


def git_state() -> dict[str, str | None]:
    """Returns the commit and the changed files of the code that runs; None outside a repository."""
    frozen = Path(__file__).resolve().parents[2] / GIT_RECORD
    if frozen.exists():
        return json.loads(frozen.read_text(encoding="utf-8"))
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _saved_and_new(run_dir: Path, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    # A key that came after the run was started had its default then.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
    old = flat(defaults) | flat(read_yaml_file(run_dir / "config.yaml"))
    new = flat(read_yaml(to_yaml(config)))
    for name, value in (kept_formats(run_dir)[0] or {}).items():
        key = f"trainer.{name}"
        old[key] = value
        new[key] = value if new[key] == "auto" else new[key]  # of no device yet
    return old, new


def _check_length(run_dir: Path, config: TrainConfig, before: int) -> None:
    """Raises UserError for a trainer.max_steps that what is done does not go with."""
    now, done = config.trainer.max_steps, steps_done(run_dir)
    field = f"trainer.max_steps={now}"
    if now < done:
        raise UserError(
            f"{field}: run_dir={run_dir} has done {done} steps already; set trainer.max_steps to "
            "that or more, or choose another run_dir"
        )
    if now == before or not done:
        return
    if now > done and not newest_step(run_dir):
        raise UserError(
            f"{field}: run_dir={run_dir} was exported after {done} steps and holds no checkpoints "
            "to go on from; start another run from its export, "
            f"checkpoint={run_dir / 'export'}"
        )
    from blackpoint.train.optimizer import (
        learning_rate_factor,  # torch: where it is asked for alone
    )

    settings = config.optimizer
    then, other = (learning_rate_factor(done - 1, settings, steps) for steps in (before, now))
    if then != other:
        raise UserError(
            f"{field}: run_dir={run_dir} was begun with trainer.max_steps={before}, and with "
            f"optimizer.decay={settings.decay} its learning rate falls to 0 there: step {done}, "
            f"which is done, had {settings.learning_rate * then:.3g} and would have had "
            f"{settings.learning_rate * other:.3g}. Continue it with trainer.max_steps={before}, "
            "or choose another run_dir"
        )


def _updated(
    saved: dict[str, Any], now: dict[str, Any], keys: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Returns `saved` with the values that the dotted `keys` have now; others stay as they are."""
    tree = dict(saved)
    for name, value in now.items():
        key = f"{prefix}{name}"
        if key in keys:
            tree[name] = value
        elif isinstance(value, dict):
            section = _updated(saved.get(name) or {}, value, keys, f"{key}.")
            tree |= {name: section} if section else {}
    return tree


def _same_place(one: Any, other: Any) -> bool:
    return (
        isinstance(one, str)
        and isinstance(other, str)
        and not (is_remote(one) or is_remote(other))
        and os.path.realpath(one) == os.path.realpath(other)
    )


def _same(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    then, now = old.get(key, ABSENT), new.get(key, ABSENT)
    if then == now or (key == "data.resolution" and not now):  # it goes on with what it has
        return True
    is_path = may_change(key, When.SAME_DATA) or may_change(key, When.SAME_BASE)
    return is_path and _same_place(then, now)
