"""docs/extending.md adds a loss weight, a metric and a verb; a copy of the code runs them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blackpoint.train.records.metrics_file import read_metrics
from tests.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
HEADINGS = ("A loss weight", "A metric of training", "A verb")
BLOCK = re.compile(r"```python\n# (\S+?)(?:: (\w+))?\n(.*?)```", re.DOTALL)
RUN = """
import sys, types
sys.modules["blackpoint"] = types.ModuleType("blackpoint")
sys.modules["blackpoint"].__path__ = ["."]
from blackpoint.scripts.cli import main
assert main(["steps", "num_steps=3"]) == 0
sys.exit(main(["train", sys.argv[1], "loss.weighting=root_snr"]))
"""


def additions(heading: str) -> list[tuple[str, str, str]]:
    """Returns file, table ("" for a new file) and content of each block under a heading."""
    section = re.split(r"^## ", PAGE.partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    return BLOCK.findall(section)


def add_to_table(path: Path, table: str, line: str, new_file: str) -> None:
    """Puts a line before the end of a table, and the import of the name that it holds."""
    source = path.read_text(encoding="utf-8")
    name = line.split()[-1].strip("(),")
    if (module := "blackpoint." + new_file.removesuffix(".py").replace("/", ".")) not in line:
        head, start, rest = source.partition("\nimport ")
        source = f"{head}\nfrom {module} import {name}{start}{rest}"
    pattern = re.compile(rf"^{table}\b[^\n]*? = ([{{(].*?)([}})])$", re.MULTILINE | re.DOTALL)
    match = pattern.search(source)
    assert match is not None, f"{path} has no table {table}"
    entries = match[1].rstrip().rstrip(",")
    added = f"{entries},\n{line.rstrip()}\n{match[2]}"
    path.write_text(source[: match.start(1)] + added + source[match.end() :], encoding="utf-8")


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_addition_is_a_new_file_and_one_line_of_a_table(heading: str) -> None:
    (new_file, table, content), (existing, name, line) = additions(heading)
    assert not table and not (ROOT / new_file).exists()
    assert name and (ROOT / existing).is_file() and line.count("\n") == 1
    code = [row for row in content.splitlines() if row.strip()]
    assert len(code) < 15


@pytest.mark.slow
def test_the_additions_of_the_page_work(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    for package in ("data", "sampling", "train", "scripts"):
        shutil.copytree(ROOT / package, copy / package)
    for heading in HEADINGS:
        (new_file, _, content), (existing, table, line) = additions(heading)
        (copy / new_file).write_text(content, encoding="utf-8")
        add_to_table(copy / existing, table, line, new_file)
    config = tiny_config(tmp_path / "run", pipeline, shards, **{"trainer.max_steps": 1})
    from blackpoint.scripts.config import to_yaml

    (tmp_path / "train.yaml").write_text(to_yaml(config), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "train.yaml")],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("999 666 332")
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    assert metrics["train/loss_spread"][0][1] > 0
    assert metrics["train/objective"][0][1] != metrics["train/loss"][0][1]
