"""Every YAML in configs/ says what it is for, how to launch it, and loads as its header says."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.shards import find_shards
from scripts.cli import VERBS, chosen_config_class
from scripts.config import load, read_yaml
from scripts.config_fields import fields_of, nested_class
from train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def header_of(path: Path) -> dict[str, str]:
    """Reads the comment block at the top: `# Key: text`, continued on lines indented further."""
    header: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"^# ([A-Z][a-z]+): +(.*)$", line)
        if match:
            key = match[1]
            header[key] = match[2].strip()
        elif key:
            header[key] += " " + line.removeprefix("#").strip()
    return header


def command_of(path: Path) -> tuple[type, list[str]]:
    """Returns the config class of the verb that the header's command calls, and its arguments."""
    program, *arguments = shlex.split(header_of(path)["Command"])
    assert program == "blackpoint"
    verb = next(verb for verb in (" ".join(arguments[:2]), arguments[0]) if verb in VERBS)
    rest = arguments[len(verb.split()) :]
    module = importlib.import_module(VERBS[verb][0])
    return chosen_config_class(module, [str(path), *rest[1:]]), rest


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_with_the_command_of_its_header(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"Purpose", "Command", "Hardware", "Expected"} <= header_of(path).keys()
    config_class, arguments = command_of(path)
    assert arguments[0] == str(path.relative_to(ROOT)), "the command names another file"
    monkeypatch.chdir(ROOT)
    assert isinstance(load(config_class, arguments), config_class)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_holds_only_differences_from_the_defaults(path: Path) -> None:
    known = fields_of(command_of(path)[0])

    def same_as_default(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in values.items():
            field = known.get(f"{prefix}{key}")
            if key == "study":  # it says which keys there are
                continue
            if field is not None and nested_class(field.hint) and isinstance(value, dict):
                yield from same_as_default(value, f"{prefix}{key}.")
            elif field is not None and field.default == value:
                yield field.path

    assert not list(same_as_default(read_yaml(path)))


def test_the_commands_that_slurm_train_shows_need_no_other_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    commands = re.findall(r"^#   sbatch .*slurm/train\.sbatch (.+)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        monkeypatch.chdir(ROOT)
        config = load(TrainConfig, shlex.split(command.replace("%a", "3")))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="data pack source=IMAGES output=shards/train"):
            find_shards(config.data.shards)


def test_the_configs_that_the_readme_and_outside_scripts_name_are_here() -> None:
    names = {path.name for path in CONFIGS}
    assert {"tiny_zero_snr.yaml", "sd15_zero_snr.yaml", "sd21_zero_snr.yaml"} <= names
