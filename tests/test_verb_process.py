"""Verbs in processes of their own: whose code they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blackpoint.scripts import verb_process
from blackpoint.scripts.verb_process import verb_command


@pytest.mark.parametrize("is_safe", [False, True])
def test_packages_of_the_working_folder_stand_in_for_none_of_ours(
    tmp_path: Path, is_safe: bool
) -> None:
    for name in ("data", "sampling", "scripts", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "typing.py").write_text("raise RuntimeError('not the standard one')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        verb_command("sweep", "--help"),
        cwd=tmp_path,
        env=environment | ({"PYTHONSAFEPATH": "1"} if is_safe else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "blackpoint sweep" in done.stdout, done.stderr
    assert not list(tmp_path.rglob("__pycache__"))


def test_the_code_is_that_of_this_process(tmp_path: Path) -> None:
    """Also of a copy, such as the frozen one of a run, that no path of Python's names."""
    copy = tmp_path / "copy" / "scripts"
    copy.mkdir(parents=True)
    source = Path(verb_process.__file__).read_text()
    (copy / "verb_process.py").write_text(source)
    (copy / "__init__.py").touch()
    cli = """
import subprocess, sys
from blackpoint.scripts import verb_process
from blackpoint.scripts.verb_process import verb_command

def entry() -> None:
    print("of the copy:", __file__, flush=True)
    if sys.argv[1:]:
        subprocess.run(verb_command(), check=True)
"""
    (copy / "cli.py").write_text(cli)
    done = subprocess.run(
        [sys.executable, str(copy / "verb_process.py"), "once more"],
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [f"of the copy: {copy / 'cli.py'}"] * 2, done.stderr
