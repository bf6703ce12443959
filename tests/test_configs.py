"""Every YAML in configs/ says what it is for, how to launch it, and loads as its header says."""

import dataclasses
import importlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.shards.listing import find_shards
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.cli import VERBS, chosen_config_class
from blackpoint.scripts.config import load, read_yaml
from blackpoint.scripts.config_fields import fields_of, hint_at, nested_class
from blackpoint.scripts.sweep.config import SweepConfig
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.schedule_config import ShiftConfig
from blackpoint.train.target_process import fine_tuned_process

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINING = {
    *(f"sd15_zero_snr{end}" for end in ("", "_24gb", "_48gb", "_80gb", "_lora")),
    *(f"sd21_zero_snr{end}" for end in ("", "_24gb", "_48gb", "_80gb")),
    *(f"sdxl_zero_snr{end}" for end in ("", "_24gb", "_48gb", "_80gb", "_lora")),
    "sd21_768_shift",
    "pixel_256",
    "pixel_512",
} | {f"tiny_{name}" for name in ("zero_snr", "zero_snr_lora", "control", "longer", "pixel")}
# The header's line `Process`; a single shift holds at every t.
SHIFT = r"log SNR \+ 2 log\((\d+) / (\d+)\)(?: at t = 0 to 2 log\((\d+) / (\d+)\) at T - 1)?"
PROCESS = re.compile(rf"(\w+), (zero|non-zero) terminal SNR, (\w+), (?:no shift|{SHIFT})")


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


def process_of(config: TrainConfig) -> Process:
    """Builds the process that a config trains to, from that of Stable Diffusion or of its base."""
    base = Process(NoiseSchedule.scaled_linear(), "epsilon", "leading")
    scheduler = ROOT / (config.checkpoint or "") / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        base = Process.from_diffusers(json.loads(scheduler.read_text()))
    return fine_tuned_process(config, base)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem in TRAINING], ids=lambda p: p.name)
def test_a_training_config_builds_the_process_that_its_header_names(path: Path) -> None:
    """A base that is lower by a factor 2 at one end alone would be off by 1.4 nats there."""
    config = load(TrainConfig, [str(path), "data.shards=shards"])
    process = process_of(config)
    named = PROCESS.fullmatch(header_of(path)["Process"])
    assert named is not None, header_of(path)["Process"]
    prediction_type, terminal, spacing, *resolutions = named.groups()
    assert (process.prediction_type, process.timestep_spacing) == (prediction_type, spacing)
    assert process.schedule.is_zero_terminal_snr == (terminal == "zero")

    unshifted = dataclasses.replace(config.schedule, shift=ShiftConfig())
    plain = process_of(dataclasses.replace(config, schedule=unshifted)).schedule
    bases = [float(each) for each in resolutions if each] or [1.0, 1.0]
    start = 2 * math.log(bases[0] / bases[1])
    end = 2 * math.log(bases[-2] / bases[-1])
    u = torch.linspace(0, 1, plain.num_steps, dtype=torch.float64)
    finite = plain.log_snr.isfinite()  # but at T - 1, where zero SNR stays zero
    shift = (process.schedule.log_snr - plain.log_snr)[finite]
    assert_close(shift, ((1 - u) * start + u * end)[finite], rtol=0, atol=1e-8)


def test_every_training_config_is_among_those_whose_process_is_tested() -> None:
    assert {path.stem for path in CONFIGS if command_of(path)[0] is TrainConfig} == TRAINING


@pytest.mark.parametrize("zero_snr", [False, True])
def test_pixel_512_has_the_interpolated_schedule_of_its_paper(zero_snr: bool) -> None:
    """Hoogeboom et al. 2023, in their own terms; the rescale of Lin et al. 2023 comes first.

    Equal to 1e-8 in log SNR at every t but T - 1 of zero SNR; the bases the other way round are
    off by 2 log(256 / 32) = 4.16 at both ends.
    """
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    t_min, t_max = math.atan(math.exp(-0.5 * 15)), math.atan(math.exp(-0.5 * -15))
    cosine = -2 * torch.log(torch.tan(t_min + t * (t_max - t_min)))
    if zero_snr:
        alpha = cosine.sigmoid().sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        cosine = (alpha.square() / (1 - alpha.square())).log()
    low, high = (cosine + 2 * math.log(noise_d / 512) for noise_d in (32, 256))
    paper = t * low + (1 - t) * high
    path = str(ROOT / "configs" / "pixel_512.yaml")
    config = load(TrainConfig, [path, f"schedule.zero_terminal_snr={zero_snr}"])
    num_compared = 999 if zero_snr else 1000
    found = process_of(config).schedule.log_snr
    assert_close(found[:num_compared], paper[:num_compared], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if command_of(p)[0] is SweepConfig], ids=lambda p: p.name
)
def test_the_cells_of_a_sweep_have_keys_of_its_verbs(path: Path) -> None:
    config = load(SweepConfig, [str(path)])
    keys = [key for arm in config.arms.values() for key in flat(arm or {})]
    keys += [*flat(config.grid)]
    assert keys and not [key for key in keys if hint_at(SweepConfig, f"arms.any.{key}") is None]
