"""The command: help without heavy imports, verbs by name, and one exit status for each outcome."""

import importlib
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blackpoint.data.files.errors import Resumable, RunFailed, UserError
from blackpoint.scripts import cli
from blackpoint.scripts.config import load
from blackpoint.scripts.config_fields import fields_of, nested_class
from blackpoint.train.records.environment import git_state

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class ToyConfig:
    """A toy."""

    seed: int = 0
    """Seed of every draw."""


Install = Callable[[Callable[[ToyConfig], int | None]], None]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a verb `toy`, and `toy box`, whose run is the given function."""

    def install(run: Callable[[ToyConfig], int | None]) -> None:
        module = types.ModuleType("toy_verb")
        module.config_class = lambda: ToyConfig  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "toy_verb", module)
        monkeypatch.setitem(cli.VERBS, "toy", ("toy_verb", "Plays."))
        monkeypatch.setitem(cli.VERBS, "toy box", ("toy_verb", "Tidies up."))

    return install


def raising(error: BaseException) -> Callable[[ToyConfig], int]:
    def run(config: ToyConfig) -> int:
        raise error

    return run


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_neither_torch_nor_omegaconf(argument: str) -> None:
    heavy = run_python(
        "import sys; from blackpoint.scripts.cli import main;"
        f"assert main(['{argument}']) == 0;"
        "print('heavy', sorted({'torch', 'omegaconf', 'numpy', 'lightning'} & set(sys.modules)))"
    )
    assert heavy.endswith("heavy []\n")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (_, purpose) in cli.VERBS.items():
        assert verb in out and purpose in out
    assert max(map(len, out.splitlines())) <= 100
    assert cli.main([]) == 2


def test_every_verb_has_its_module() -> None:
    for module, _ in cli.VERBS.values():
        assert (ROOT / (module.removeprefix("blackpoint.").replace(".", "/") + ".py")).is_file(), (
            module
        )


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("blackpoint")
    result = subprocess.run([command, "trian"], capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "blackpoint: `trian` is not a verb; did you mean `blackpoint train`?\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["evalute"], "did you mean `blackpoint evaluate`?"),
        (["data"], "did you mean `blackpoint data pack`?"),
        (["data", "pcak"], "`data pcak` is not a verb; did you mean `blackpoint data pack`?"),
        (["xyzzy"], "see blackpoint --help"),
        (["--seed=3"], "see blackpoint --help"),
    ],
)
def test_unknown_verbs(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert part in capsys.readouterr().err


def test_a_verb_gets_its_config_and_gives_its_status(toy: Install) -> None:
    seen: list[ToyConfig] = []
    toy(seen.append)
    assert cli.main(["toy", "seed=4"]) == 0
    assert cli.main(["toy", "box", "seed=5"]) == 0
    assert seen == [ToyConfig(4), ToyConfig(5)]
    toy(lambda config: 75)
    assert cli.main(["toy"]) == 75


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("seed = -1: must be 0 or more"), 2),
        (UserError("shards: none found"), 2),
        (RunFailed("loss is nan at step 3"), 1),
        (Resumable("stopped by the time limit"), 75),
    ],
)
def test_foreseen_errors_print_their_message_only(
    error: Exception, status: int, toy: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(raising(error))
    assert cli.main(["toy"]) == status
    assert capsys.readouterr().err == f"blackpoint: {error}\n"


def test_unforeseen_errors_keep_their_traceback(
    toy: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(raising(ValueError("shapes differ")))
    assert cli.main(["toy"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ValueError: shapes differ" in err


def test_interrupt_is_one_line(toy: Install, capsys: pytest.CaptureFixture[str]) -> None:
    toy(raising(KeyboardInterrupt()))
    assert cli.main(["toy"]) == 130
    assert capsys.readouterr().err == "blackpoint: interrupted\n"


def test_bad_config_exits_2_before_the_run(
    toy: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(raising(AssertionError("must not run")))
    assert cli.main(["toy", "sed=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "did you mean `seed`?" in captured.err


def test_print_config_prints_what_load_reads_back(
    toy: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(raising(AssertionError("must not run")))
    assert cli.main(["toy", "--print-config", "seed=9"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(ToyConfig, [str(path)]) == ToyConfig(9)


def test_verb_help_lists_the_fields(toy: Install, capsys: pytest.CaptureFixture[str]) -> None:
    toy(raising(AssertionError("must not run")))
    assert cli.main(["toy", "--help", "sed=1"]) == 0
    out = capsys.readouterr().out
    assert "usage: blackpoint toy" in out and "Plays." in out
    assert re.search(r"seed +\(int; default 0\)\n +Seed of every draw\.", out)
    assert cli.main(["data", "--help"]) == 0
    assert "data pack" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_field_of_every_verb_has_a_meaning(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_class = importlib.import_module(cli.VERBS[verb][0]).config_class()
    blank = [
        entry.path
        for entry in fields_of(config_class).values()
        if not entry.meaning and not nested_class(entry.hint)
    ]
    assert not blank, "write a docstring under each of these fields"
    assert cli.main([*verb.split(), "--help"]) == 0
    assert f"usage: blackpoint {verb} [CONFIG.yaml]" in capsys.readouterr().out


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / ".venv" / "environment.py"
    site.parent.mkdir()
    site.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in ("init", "commit --allow-empty --message=theirs"):
        subprocess.run([*git, *command.split()], check=True, capture_output=True)
    monkeypatch.setattr("blackpoint.train.records.environment.HERE", site)
    assert set(git_state().values()) == {None}
