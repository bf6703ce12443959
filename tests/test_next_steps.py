"""The commands that a verb ends with: complete, of keys that exist, and one table of them."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config import load
from blackpoint.scripts.next_steps import NEXT, next_steps

FOLDERS = {"run_dir": "runs/my run", "output": "out", "shards": "shards/a"}
CONFIG = SimpleNamespace(
    **FOLDERS, source="photos", checkpoint="assets/tiny_sd", plan=False, format="merged"
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "train plan": ("train", {"plan": True}),
    "train new": ("train", {"checkpoint": None}),
    "export file": ("export", {"output": "a/b.safetensors"}),
    "export lora": ("export", {"format": "lora"}),
    "init": ("init", {"output": "configs/tiny_zero_snr.yaml"}),
}
PLAN = ["configs/tiny_zero_snr.yaml", "run_dir=runs/my run", "card_gib=24", "plan=true"]


@pytest.mark.parametrize("row", NEXT)
def test_every_command_loads_as_it_stands(row: str) -> None:
    verb, changes = KINDS.get(row, (row, {}))
    assert verb in VERBS
    config = SimpleNamespace(**{**vars(CONFIG), **changes})
    title, *steps = next_steps(verb, config, PLAN)
    assert title == "next:" and steps
    for step in steps:
        program, *words = shlex.split(step, comments=True)
        if program in ("less", "sbatch"):
            assert words[-1] in ("out/README.md", "run_dir=runs/my run", config.output)
            continue
        assert program == "blackpoint"
        name = next(n for n in (" ".join(words[:2]), words[0]) if n in VERBS)
        chosen = importlib.import_module(VERBS[name][0]).config_class()
        loaded = load(chosen, words[len(name.split()) :])
        assert isinstance(loaded, chosen)
        if verb == "train" and name == "train":
            assert loaded.run_dir == "runs/my run" and not loaded.plan and loaded.card_gib is None


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_one_process_tells(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv(variable, "0")
    assert [*next_steps("search", CONFIG, [])]
    monkeypatch.setenv(variable, "1")
    assert not [*next_steps("search", CONFIG, [])]


def test_a_single_file_is_offered_where_readers_know_the_model(tmp_path: Path) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "run_dir": str(tmp_path)})
    settings = tmp_path / "export" / "unet" / "config.json"
    settings.parent.mkdir(parents=True)
    for groups, is_offered in ((8, False), (32, True)):
        settings.write_text(json.dumps({"norm_num_groups": groups}))
        assert any("safetensors" in step for step in next_steps("train", config, [])) is is_offered


def test_a_planned_sweep_says_its_own_command() -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "plan": True})
    assert not [*next_steps("sweep", config, [])]
