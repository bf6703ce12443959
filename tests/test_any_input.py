"""Random inputs through the command's own entry: no traceback, no silent change.

Each law draws cases of one kind. What is accepted (status 0) was taken as it was given; what is
refused (status 2) is refused in words, and leaves nothing. 200 cases by seed; the random search:

    python -m pytest tests/test_any_input.py --hypothesis-profile=thorough
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.input_cases import CASES, Case, in_this_process
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 2 * settings.default.max_examples  # type: ignore[attr-defined]
"""Cases of all kinds together."""
Runner = Callable[[list[str], Path], tuple[int, str]]


def in_its_own_process(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Runs the command as a shell does."""
    found = subprocess.run(
        [sys.executable, "-m", "blackpoint.scripts.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    return found.returncode, found.stdout


def check(case: Case, folder: Path, runner: Runner = in_this_process) -> None:
    """Runs a case: it is accepted and does what it says, or is refused and leaves nothing."""
    status, printed = runner(case.arguments, folder)
    assert "Traceback" not in printed, printed
    assert status in (0, 2), printed
    if status == 0:
        case.accepted(printed)
        return
    assert printed.strip(), "refused without a word"
    assert case.output is None or not case.output.exists()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def one_case(data: st.DataObject, kind: str, runner: Runner, pipeline: Path) -> None:
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        home = folder / "home"
        home.mkdir()
        if kind == "schedulers":
            shutil.copytree(pipeline, folder / "pipeline")
        patch.setenv("HOME", str(home))
        patch.delenv("NOT_SET", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

        @st.composite
        def made(draw: st.DrawFn) -> Case:
            return CASES[kind](draw, folder)

        check(data.draw(made()), home, runner)


UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("kind", CASES)
def test_an_input_is_taken_as_it_is_or_refused_in_words(kind: str, pipeline: Path) -> None:
    @settings(max_examples=BUDGET // len(CASES), suppress_health_check=UNHURRIED)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        one_case(data, kind, in_this_process, pipeline)

    law()


@pytest.mark.slow
def test_so_it_is_in_processes_of_their_own(pipeline: Path) -> None:
    @settings(max_examples=BUDGET // 40, suppress_health_check=UNHURRIED)
    @given(st.data(), st.sampled_from(sorted(CASES)))
    def law(data: st.DataObject, kind: str) -> None:
        one_case(data, kind, in_its_own_process, pipeline)

    law()
