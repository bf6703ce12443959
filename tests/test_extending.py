"""What docs/extending.md adds works as the page says: the file and the line, in a copy of the code.

The files, lines and imports are read from the page, so that the two can't disagree.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search.config import ALGORITHMS
from blackpoint.sampling.verifiers.load import KINDS

ROOT = Path(__file__).resolve().parents[1]
CODE = ("data", "sampling", "scripts", "train")
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
ADDITION = re.compile(
    r"```python\n# (?P<file>\S+)\n(?P<content>.*?)```.*?"
    r"line in `(?P<table>\w+)` of (?P<module>\S+?): `(?P<line>[^`]+)`, "
    r"the import:\s`(?P<import>[^`]+)`",
    re.DOTALL,
)
KEYS = {
    "A sampler": ["sampler=angle"],
    "A verifier": ["verifiers.contrast.kind=contrast", "verifiers.contrast.gain=2"],
    "A search algorithm": ["algorithm=patient", "patient.patience=1", "sampler=euler"],
}


def addition(heading: str) -> re.Match[str]:
    """Returns the parts of an addition on the page."""
    [_, section] = PAGE.split(f"## {heading}\n")
    found = ADDITION.search(section)
    assert found is not None, f"{heading}: no file, line and import"
    return found


def extend(root: Path, heading: str) -> None:
    """Copies the code and makes the addition there."""
    for package in CODE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    added = addition(heading)
    (root / added["file"]).write_text(f'"""An addition."""\n{added["content"]}')
    module = root / added["module"]
    text = module.read_text(encoding="utf-8")
    table = f"\n{added['table']} = {{\n"
    assert text.count(table) == 1
    text = text.replace(table, f"\n{added['import']}\n{table}    {added['line']}\n")
    module.write_text(text, encoding="utf-8")


def run(root: Path, *arguments: str) -> str:
    """Runs a command line of the copy; returns what it prints."""
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "verb_process.py"), *arguments],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("heading", KEYS)
def test_an_addition_is_short(heading: str) -> None:
    lines = [line for line in addition(heading)["content"].splitlines() if line.strip()]
    assert len(lines) < 15


def test_nothing_is_told_by_the_name_of_a_sampler_kind_or_algorithm() -> None:
    names = {*SAMPLERS, *KINDS, *ALGORITHMS}
    for path in (ROOT / "sampling").rglob("*.py"):
        if path.name.startswith("stability"):
            continue  # of its own kind and algorithm
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
                asked = node.left.attr in ("sampler", "kind", "algorithm")
                others = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                assert not (asked and others & names), f"{path}:{node.lineno}"


@pytest.mark.slow
@pytest.mark.parametrize("heading", KEYS)
def test_an_addition_runs(heading: str, tmp_path: Path, pipeline: Path) -> None:
    root, keys = tmp_path / "code", KEYS[heading]
    extend(root, heading)
    key, _, name = keys[0].partition("=")
    assert re.search(rf"\b{name}\b", run(root, "search", "--help"))
    if heading != "A verifier":
        keys = [*keys, "verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
    run(
        root,
        "search",
        f"checkpoint={pipeline}",
        "prompts=a red photo",
        f"output={tmp_path / 'out'}",
        "budget_nfe=32",
        "num_steps=2",
        *keys,
    )
    rows = [json.loads(line) for line in (tmp_path / "out/candidates.jsonl").open()]
    settings = json.loads((tmp_path / "out/search.json").read_text())
    assert rows and all(row["score"] is not None for row in rows)
    if heading == "A search algorithm":
        assert settings["patient"] == {"patience": 1} and rows[0]["algorithm"] == name
        scores = [row["score"] for row in rows]
        assert scores[-1] <= max(scores[:-1]), "it went on after a draw that was no better"
    elif heading == "A verifier":
        assert set(rows[0]["scores"]) == {name}
    else:
        assert settings[key] == name
